"""The whole model: every feature on and off, packed rows, the soft-cap, and gradients that reach every parameter."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.config import Gemma4Config
from gemma4_jax.model import Gemma4
from gemma4_jax.sizes import quickstart
from tests.hf import samples


def replace(config: Gemma4Config, text=None, vision=None) -> Gemma4Config:
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, **text or {}),
        vision=dataclasses.replace(config.vision, **vision or {}),
    )


SMALL = replace(
    quickstart(),
    text={
        "vocab_size": 40, "embed_dim": 16, "mlp_dim": 12, "num_heads": 4, "num_kv_heads": 2, "num_global_kv_heads": 1,
        "head_dim": 8, "global_head_dim": 16, "sliding_window": 5, "per_layer_embed_dim": 16, "expert_dim": 8,
        "max_positions": 128,
    },
    vision={"embed_dim": 16, "mlp_dim": 12, "head_dim": 8, "num_positions": 32},
)  # fmt: skip
"""The quickstart's model, which has every part, narrower.

The per-layer gates stay wide: of only four, all may lie in the tail of the GELU at some token, where float32 keeps
three digits of them, and the norm behind them makes these as large as any. Logits are then wrong by 1e-4, not by 2e-6.
"""

RNG = np.random.default_rng(0)
WORDS = [RNG.integers(14, 40, n).tolist() for n in (9, 4, 6, 5, 11)]
PICTURES = [samples.image(RNG, SMALL, rows, columns) for rows, columns in ((2, 3), (4, 1), (1, 1))]
DOCUMENTS = [
    [[2, *WORDS[0]]],
    [[2], PICTURES[0], WORDS[1], PICTURES[1], WORDS[2]],
    [[2, *WORDS[3]], PICTURES[2]],
    [[2, *WORDS[4]]],
]


def batch_of(rows, config=SMALL):
    return jax.tree.map(jnp.asarray, samples.batch(rows, config))


# Feature -> (the config without it, a parameter that only the feature has).
WITHOUT = {
    "experts": (replace(SMALL, text={"num_experts": 0}), "decoder.own.layers.0.moe.experts.down"),
    "per-layer embeddings": (replace(SMALL, text={"per_layer_embed_dim": 0}), "per_layer_embedder.table"),
    "shared keys and values": (
        replace(SMALL, text={"num_kv_shared_layers": 0}),
        "decoder.shared.layers.0.attention.q.kernel",
    ),
    "clipped linears": (replace(SMALL, vision={"uses_clipped_linears": False}), "vision.layers.mlp.up.input_min"),
    "standardisation": (replace(SMALL, vision={"standardizes": False}), "vision.std_scale"),
    "images": (dataclasses.replace(SMALL, vision=None), "image_projection.kernel"),
}


def names_of(config: Gemma4Config) -> set[str]:
    """Paths of all parameters and buffers."""
    state = nnx.state(nnx.eval_shape(lambda: Gemma4(config, nnx.Rngs(0))))
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def logits_of(config: Gemma4Config, rows, **changes: float) -> np.ndarray:
    """Logits with lively weights; with `changes`, some parameters are multiplied."""
    model = samples.model(config, samples.lively_weights(config))
    for name, factor in changes.items():
        table = getattr(model, name).table
        table[...] = table[...] * factor
    return np.asarray(samples.logits(model, rows))


@pytest.fixture(scope="module")
def packed():
    return batch_of([DOCUMENTS[:2], DOCUMENTS[2:]])


@pytest.fixture(scope="module")
def logits(packed):
    return logits_of(SMALL, packed)


@pytest.mark.parametrize("feature", WITHOUT)
def test_each_part_may_be_left_out(feature):
    config, parameter = WITHOUT[feature]
    assert parameter in names_of(SMALL)
    assert parameter not in names_of(config)
    logits = logits_of(config, batch_of([[DOCUMENTS[0]]]) if config.vision is None else batch_of([DOCUMENTS[:2]]))
    assert logits.shape[-1] == config.text.vocab_size
    assert np.all(np.isfinite(logits))


# Features that have no parameters of their own, or others: they must change what is computed.
OTHERWISE = {
    "causal image blocks": {"image_blocks_bidirectional": False},
    "a wider window": {"sliding_window": 6},
    "another base of rotary frequencies": {"rope_theta": 100.0},
    "all of the global head rotated": {"global_rope_fraction": 1.0},
    "no soft-cap": {"final_logit_softcap": 0.0},
    "another choice of experts": {"num_experts_per_token": 1},
}


@pytest.mark.parametrize("feature", OTHERWISE)
def test_each_switch_changes_the_logits(feature, packed, logits):
    otherwise = logits_of(replace(SMALL, text=OTHERWISE[feature]), packed)
    assert np.all(np.isfinite(otherwise))
    assert np.abs(otherwise - logits).max() > 1e-3 * np.abs(logits).max()


@pytest.mark.parametrize(
    "text",
    [
        {"uses_k_eq_v": False, "num_global_kv_heads": 2},
        {"uses_double_wide_mlp": False},
        {"attention_period": 1},
        {"num_layers": 6, "num_kv_shared_layers": 4},
    ],
    ids=str,
)
def test_each_arrangement_of_layers_builds(text, packed):
    config = replace(SMALL, text=text)
    assert np.all(np.isfinite(logits_of(config, packed)))


def test_packed_rows_equal_each_document_alone(packed, logits):
    alone = logits_of(SMALL, batch_of([[document] for document in DOCUMENTS]))
    lengths = [len(samples.example(document, SMALL).tokens) for document in DOCUMENTS]
    places = [(0, 0), (0, lengths[0]), (1, 0), (1, lengths[2])]
    for expected, length, (row, start) in zip(alone, lengths, places, strict=True):
        # float32 sums in another order: either side is at most 2e-6 of the largest logit from float64, in which they
        # are equal to 1e-15, and 7e-7 from the other, for three sets of instructions of the CPU.
        np.testing.assert_allclose(
            logits[row, start : start + length], expected[:length], rtol=0, atol=1e-5 * np.abs(alone).max()
        )


def test_the_cap_bounds_logits(packed):
    cap = SMALL.text.final_logit_softcap
    uncapped = replace(SMALL, text={"final_logit_softcap": 0.0})
    free, capped = (logits_of(config, packed, embedder=30.0) for config in (uncapped, SMALL))
    assert np.abs(free).max() > 10 * cap
    assert np.abs(capped).max() <= cap
    # float32 after a tanh: the largest measured error is 8e-6 where logits are 30.
    np.testing.assert_allclose(capped, cap * np.tanh(free / cap), rtol=0, atol=5e-5)


def test_a_text_batch_needs_no_patches():
    rows = batch_of([[DOCUMENTS[0]]])
    assert rows.patches.shape[1] == 0
    images_too = batch_of([[DOCUMENTS[0], DOCUMENTS[1]]])
    length = rows.tokens.shape[1]
    given, expected = logits_of(SMALL, rows), logits_of(SMALL, images_too)[:, :length]
    # float32 sums in another order: the largest measured difference is 8e-6 where logits are 13.
    np.testing.assert_allclose(given, expected, rtol=0, atol=5e-5)


def test_a_profile_names_the_parts(packed):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Gemma4(SMALL, nnx.Rngs(0))))
    program = jax.jit(lambda state, batch: nnx.merge(graphdef, state)(batch)).lower(state, packed)
    names = program.as_text(debug_info=True)
    parts = {
        "embed", "per_layer_embed", "vision", "decoder", "layers", "sliding_attention", "global_attention", "mlp",
        "router", "experts", "per_layer_input", "head",
    }  # fmt: skip
    assert parts - set(re.findall(r"\w+", " ".join(re.findall(r'loc\("([^"]*)/', names)))) == set()


@pytest.mark.slow
def test_gradients_reach_every_parameter_of_the_quickstart():
    """As it starts to train: every layer of every stack of the decoder and the vision tower, and every expert."""
    config = quickstart()
    rng = np.random.default_rng(1)
    words = rng.integers(14, 1024, (4, 50)).tolist()
    pictures = [samples.image(rng, config, *shape) for shape in ((3, 5), (7, 2), (1, 9), (4, 4))]
    documents = [[[2, *text[:20]], picture, text[20:]] for text, picture in zip(words, pictures, strict=True)]
    model = nnx.jit(lambda: Gemma4(config, nnx.Rngs(0)))()
    rows = samples.batch([[document] for document in documents], config)
    _, gradients = samples.loss_and_gradients(model, rows)
    assert gradients.keys() == {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    still = []
    for path, gradient in gradients.items():
        is_stacked = path.startswith(("decoder.own.", "decoder.shared.", "vision.layers."))
        parts = gradient.shape[: is_stacked + (".experts." in path)]
        largest = np.abs(gradient).reshape(*parts, -1).max(axis=-1)
        still += [f"{path}{list(map(int, index))}" for index in np.argwhere(largest == 0)]
    assert still == []
