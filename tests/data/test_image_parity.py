"""Images of 500 random sizes against the reference's own processor on Pillow.

Its other processor needs torchvision and is not compared; both compute sizes with the same function.
"""

import math

import numpy as np
import pytest

from gemma4_jax.data.images import cut_patches, resize_image
from gemma4_jax.errors import InputError
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS, num_soft_tokens

pytest.importorskip("torch")
reference = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")

CELLS = {"patch_size": 16, "pooling_size": 3}
SHARDS = 10


def random_sizes() -> list[tuple[int, int, int]]:
    """500 of (height, width, budget): ordinary shapes, extreme ones, and sides of 1 to 3 pixels, either way up."""
    rng = np.random.default_rng(2026)
    sizes = []
    for i in range(500):
        short = int(rng.integers(1, 4)) if i % 5 == 0 else int(math.exp(rng.uniform(math.log(4), math.log(900))))
        ratio = math.exp(rng.uniform(0, math.log(500) if i % 5 == 1 else math.log(4)))
        long = int(rng.integers(1, 1500)) if i % 5 == 0 else min(int(short * ratio), 4000)
        sides = (short, long) if rng.random() < 0.5 else (long, short)
        sizes.append((*sides, SOFT_TOKEN_BUDGETS[int(rng.choice(5, p=[0.35, 0.25, 0.2, 0.12, 0.08]))]))
    return sizes


def test_the_sizes_are_what_they_should_be():
    sizes = random_sizes()
    assert {budget for *_, budget in sizes} == set(SOFT_TOKEN_BUDGETS)
    assert sum(1 in size[:2] for size in sizes) > 30
    assert sum(max(size[:2]) > 50 * min(size[:2]) for size in sizes) > 50


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_equal_to_the_reference(shard):
    processor = reference.Gemma4ImageProcessorPil()
    num_refused = 0
    for i, (height, width, budget) in list(enumerate(random_sizes()))[shard::SHARDS]:
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3)).astype(np.uint8)
        try:
            # Said, because a side of 1 or 3 pixels would be taken for the channels.
            expected = processor([pixels], max_soft_tokens=budget, input_data_format="channels_last")
        except ValueError:
            num_refused += 1
            with pytest.raises(InputError, match=f"{height} x {width}"):
                resize_image(pixels, max_soft_tokens=budget, **CELLS)
            continue
        given = cut_patches(resize_image(pixels, max_soft_tokens=budget, **CELLS), **CELLS)
        case = (height, width, budget)
        assert given.num_soft_tokens == expected["num_soft_tokens_per_image"][0], case
        assert given.num_soft_tokens == num_soft_tokens(height, width, max_soft_tokens=budget, **CELLS), case
        positions, values = expected["image_position_ids"][0], expected["pixel_values"][0]
        is_patch = positions[:, 0] >= 0
        raster = np.lexsort((given.positions[:, 0], given.positions[:, 1]))
        np.testing.assert_array_equal(given.positions[raster], positions[is_patch], str(case))
        # Stored as bytes here, and divided on the device: a level of 255 is the unit.
        levels = np.abs(given.patches[raster].astype(np.float32) - 255 * np.asarray(values[is_patch], np.float32))
        assert levels.max() <= 1, case
    assert num_refused < 5
