import math

import pytest

from gemma4_jax.counts import count_active_parameters, count_parameters, flops_per_token
from gemma4_jax.sizes import SIZES

# Spec section 1, in the order of counts.PARTS.
EXPECTED = {
    "e2b": (1_877_105_920, 0, 402_653_184, 2_348_810_240, 167_364_608, 1_179_648, 304_824_608, 2_359_296),
    "e4b": (3_973_352_448, 0, 671_088_640, 2_818_572_288, 167_364_608, 1_966_080, 304_824_608, 3_932_160),
    "26b_a4b": (1_656_958_976, 22_837_985_280, 738_197_504, 0, 569_548_080, 3_244_032, 0, 0),
    "31b": (29_288_059_136, 0, 1_409_286_144, 0, 569_548_080, 6_193_152, 0, 0),
}
TOTAL = {"e2b": 5_104_297_504, "e4b": 7_941_100_832, "26b_a4b": 25_805_933_872, "31b": 31_273_086_512}

sizes = pytest.mark.parametrize("size", EXPECTED)


@sizes
def test_parameters_of_every_part(size):
    counts = count_parameters(SIZES[size]())
    assert tuple(counts.values()) == EXPECTED[size]
    assert sum(counts.values()) == TOTAL[size]


@sizes
def test_parameters_are_those_of_the_reference(size):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from gemma4_jax.hf.config import to_hf

    config = SIZES[size]()
    with torch.device("meta"):
        model = transformers.Gemma4ForConditionalGeneration(
            transformers.Gemma4Config(**to_hf(config, dtype="bfloat16", max_soft_tokens=280))
        )
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(count_parameters(config).values())


def test_eight_of_128_experts_work_on_a_token():
    assert count_active_parameters(SIZES["26b_a4b"]()) == 3_822_530_560
    assert count_active_parameters(SIZES["31b"]()) == 29_288_059_136 + 1_409_286_144


def test_an_expert_model_costs_an_eighth_of_a_dense_one():
    sparse, dense = SIZES["26b_a4b"](), SIZES["31b"]()
    assert flops_per_token(sparse, 0) / flops_per_token(dense, 0) == pytest.approx(0.1245, abs=5e-5)


def test_attention_is_counted_for_the_mean_query():
    config = SIZES["quickstart"]()
    text, length = config.text, 100
    keys = {
        is_global: sum(min(query + 1, length if is_global else text.sliding_window) for query in range(length)) / length
        for is_global in (False, True)
    }
    expected = sum(
        4 * text.num_heads * (text.global_head_dim if kind else text.head_dim) * keys[kind]
        for kind in map(text.is_global, range(text.num_layers))
    )
    assert math.isclose(flops_per_token(config, length) - flops_per_token(config, 0), expected)
