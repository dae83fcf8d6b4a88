import itertools

import pytest

from gemma4_jax.errors import InputError
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS, num_soft_tokens, patch_grid, resized_size

RELEASED = {"patch_size": 16, "pooling_size": 3}

# The table of the specification: (height, width), then (height, width, soft tokens) at budgets 70, 280 and 1120.
TABLE = [
    ((480, 640), (336, 432, 63), (672, 912, 266), (1344, 1824, 1064)),
    ((1080, 1920), (288, 528, 66), (576, 1056, 264), (1200, 2112, 1100)),
    ((224, 224), (384, 384, 64), (768, 768, 256), (1584, 1584, 1089)),
    ((1, 1), (384, 384, 64), (768, 768, 256), (1584, 1584, 1089)),
    ((1, 1000), (48, 3360, 70), (48, 13440, 280), (48, 50784, 1058)),
    ((3000, 10), (3360, 48, 70), (13440, 48, 280), (27792, 48, 579)),
    ((100, 33), (672, 192, 56), (1392, 432, 261), (2784, 912, 1102)),
]
CASES = [
    (size, budget, expected)
    for size, *results in TABLE
    for budget, expected in zip((70, 280, 1120), results, strict=True)
]


@pytest.mark.parametrize(("size", "budget", "expected"), CASES)
def test_sizes_are_those_of_the_specification(size, budget, expected):
    height, width, soft_tokens = expected
    assert resized_size(*size, max_soft_tokens=budget, **RELEASED) == (height, width)
    assert patch_grid(*size, max_soft_tokens=budget, **RELEASED) == (height // 16, width // 16)
    assert num_soft_tokens(*size, max_soft_tokens=budget, **RELEASED) == soft_tokens


@pytest.mark.parametrize(("patch_size", "pooling_size"), [(16, 3), (4, 2), (7, 1)])
def test_every_shape_stays_within_the_budget_in_whole_cells(patch_size, pooling_size):
    cell = patch_size * pooling_size
    for height, width, budget in itertools.product((1, 7, 48, 333, 4000), (1, 9, 50, 640, 9001), SOFT_TOKEN_BUDGETS):
        resized = resized_size(height, width, patch_size=patch_size, pooling_size=pooling_size, max_soft_tokens=budget)
        assert resized[0] % cell == resized[1] % cell == 0
        assert 1 <= resized[0] * resized[1] // cell**2 <= budget


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises(InputError, match="at least 1"):
        resized_size(*size, max_soft_tokens=70, **RELEASED)


def test_a_budget_that_leaves_no_cell_is_refused():
    with pytest.raises(InputError, match="larger budget"):
        resized_size(10, 10, max_soft_tokens=0, **RELEASED)


def test_the_rule_is_that_of_the_reference():
    reference = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")
    for height, width, budget in itertools.product((1, 13, 97, 1080), (1, 31, 640, 3001), SOFT_TOKEN_BUDGETS):
        for patch_size, pooling_size in ((16, 3), (4, 2)):
            ours = resized_size(height, width, patch_size=patch_size, pooling_size=pooling_size, max_soft_tokens=budget)
            max_patches = budget * pooling_size**2
            assert ours == reference.get_aspect_ratio_preserving_size(
                height, width, patch_size, max_patches, pooling_size
            )
