"""Generation against what the reference wrote once, against the model without a cache, and as a sampler."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.batch import Batch
from gemma4_jax.errors import InputError
from gemma4_jax.generation import _write, generate_tokens
from gemma4_jax.sharding import make_mesh, param_shardings
from tests.hf import samples

GOLDEN = json.loads((Path(__file__).parent / "golden" / "generated.json").read_text())


@pytest.fixture(scope="module")
def config():
    return samples.shrink("26b_a4b")


@pytest.fixture(scope="module")
def model(config):
    return samples.model(config, samples.restless_weights(config))


@pytest.fixture(scope="module")
def documents(config):
    return samples.all_documents(config)


def prompts(config, documents, **options) -> Batch:
    return samples.batch([[document] for document in documents], config, **options)


@pytest.mark.parametrize("size", samples.OFFICIAL_SIZES)
def test_as_the_reference_wrote(size):
    """All prompts in one batch: of different lengths, with images, longer than the sliding window."""
    config = samples.shrink(size)
    model = samples.model(config, samples.restless_weights(config))
    batch = prompts(config, samples.all_documents(config))
    assert generate_tokens(model, batch, max_new_tokens=samples.NEW_TOKENS) == GOLDEN[size]


def test_golden_generations_would_show_a_mistake():
    """They are no repetitions, no two prompts get the same, and placeholders are among what is written."""
    for rows in GOLDEN.values():
        assert len({tuple(row) for row in rows}) == len(rows)
        assert min(len(set(row)) for row in rows) > 4
    written = {token for rows in GOLDEN.values() for row in rows for token in row}
    assert samples.TOKENS.image in written


def test_padding_and_company_change_nothing(config, model, documents):
    given = generate_tokens(model, prompts(config, documents[1:2], length=61), max_new_tokens=samples.NEW_TOKENS)
    assert given == GOLDEN["26b_a4b"][1:2]


def test_stop_tokens_end_each_row_on_its_own(config, model, documents):
    whole = GOLDEN["26b_a4b"]
    stop = (whole[0][6], whole[1][9])
    given = generate_tokens(model, prompts(config, documents), max_new_tokens=samples.NEW_TOKENS, stop_tokens=stop)
    for row, full in zip(given, whole, strict=True):
        ends = [i for i, token in enumerate(full) if token in stop]
        assert row == (full[: ends[0] + 1] if ends else full)
    assert [len(row) for row in given] == [7, 10] + [samples.NEW_TOKENS] * (len(whole) - 2)


def test_sizes_are_compiled_once(config, model, documents):
    generate_tokens(model, prompts(config, documents[:2]), max_new_tokens=3)
    before = _write._cache_size()
    for length, count in ((52, 2), (55, 9), (56, 1)):
        generate_tokens(model, prompts(config, documents[:2], length=length), max_new_tokens=count)
    assert _write._cache_size() == before


@pytest.mark.slow
def test_on_a_mesh(config, model, documents):
    """Seven prompts on eight devices, four of which have rows of their own: the row of padding changes nothing."""
    graphdef, state = nnx.split(model)
    mesh = make_mesh({"data": 2, "expert": 2, "tensor": 2})
    spread = nnx.merge(graphdef, jax.device_put(state, param_shardings(state, mesh)))
    given = generate_tokens(spread, prompts(config, documents[:7]), max_new_tokens=samples.NEW_TOKENS)
    assert given == GOLDEN["26b_a4b"][:7]


def test_a_mesh_that_spreads_length_is_refused(config, model, documents):
    graphdef, state = nnx.split(model)
    mesh = make_mesh({"context": 2}, jax.devices()[:2])
    spread = nnx.merge(graphdef, jax.device_put(state, param_shardings(state, mesh)))
    with pytest.raises(InputError, match=r"mesh\.context=2 cannot spread single tokens"):
        generate_tokens(spread, prompts(config, documents), max_new_tokens=2)


ROWS = 4000
"""Draws of one token, in one batch."""


@pytest.fixture(scope="module")
def draws(config, model):
    """A function from arguments to how often each token was drawn after one prompt; and that prompt's logits."""
    batch = prompts(config, [[[2, 30, 41]]])
    logits = np.asarray(samples.logits(model, jax.tree.map(jnp.asarray, batch)))[0, -1].astype(np.float64)
    many = jax.tree.map(lambda leaf: np.repeat(leaf, ROWS, axis=0), batch)

    def draw(**options) -> np.ndarray:
        rows = generate_tokens(model, many, max_new_tokens=1, **options)
        return np.bincount([row[0] for row in rows], minlength=config.text.vocab_size)

    return draw, logits


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "num_kept"),
    [(1.0, 0, 1.0, 160), (0.2, 0, 1.0, 160), (0.2, 0, 0.5, 57), (0.2, 7, 1.0, 7), (0.3, 20, 0.6, 12)],
)
def test_frequencies_are_those_of_the_distribution(temperature, top_k, top_p, num_kept, draws):
    draw, logits = draws
    expected = np.exp(logits / temperature - np.max(logits / temperature))
    expected[np.argsort(-expected)[top_k or len(expected) :]] = 0
    expected /= expected.sum()
    order = np.argsort(-expected)
    likelier = np.cumsum(expected[order]) - expected[order]
    expected[order[likelier >= top_p]] = 0
    expected /= expected.sum()
    counts = draw(temperature=temperature, top_k=top_k, top_p=top_p, seed=3)
    assert not counts[expected == 0].any()
    # Counts of ROWS draws: chi-squared of n - 1 degrees of freedom, here at most five deviations above its mean.
    n = np.count_nonzero(expected)
    chi_squared = np.sum((counts - ROWS * expected)[expected > 0] ** 2 / (ROWS * expected[expected > 0]))
    assert chi_squared < (n - 1) + 5 * np.sqrt(2 * (n - 1))
    assert n == num_kept  # counted once by hand, from the sorted probabilities


def test_top_k_1_is_greedy(config, model, documents):
    given = generate_tokens(model, prompts(config, documents), max_new_tokens=20, temperature=5.0, top_k=1, seed=9)
    assert given == GOLDEN["26b_a4b"]


def test_a_tiny_top_p_is_greedy(config, model, documents):
    given = generate_tokens(model, prompts(config, documents), max_new_tokens=20, temperature=1.0, top_p=1e-6, seed=9)
    assert given == GOLDEN["26b_a4b"]


def test_a_top_k_beyond_the_vocabulary_is_no_limit(config, model, documents):
    def draw(top_k: int) -> list[list[int]]:
        given = prompts(config, documents)
        return generate_tokens(model, given, max_new_tokens=20, temperature=1.0, top_k=top_k, seed=1)

    assert draw(2**40) == draw(0)


def test_the_seed_decides_the_draws(config, model, documents):
    def draw(seed: int) -> list[list[int]]:
        return generate_tokens(model, prompts(config, documents), max_new_tokens=20, temperature=1.0, seed=seed)

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 .* at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 .* at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0 .* above 0 and at most 1"),
        ({"top_k": 5}, "top_k=5 does nothing at temperature=0, .* give a temperature above 0"),
        ({"top_p": 0.5}, "top_p=0.5 does nothing at temperature=0"),
        ({"temperature": 1.0, "seed": 2**70}, "seed=1180591620717411303424 .* between 0 and"),
        ({"max_new_tokens": 500}, r"a prompt of \d+ tokens and max_new_tokens=500 are more than the 512 positions"),
    ],
)
def test_bad_arguments(options, reason, config, model, documents):
    with pytest.raises(InputError, match=reason):
        generate_tokens(model, prompts(config, documents), **{"max_new_tokens": 4} | options)


def test_rows_of_several_documents_are_refused(config, model, documents):
    with pytest.raises(InputError, match="one document a row"):
        generate_tokens(model, samples.batch([documents[:2]], config), max_new_tokens=2)
    batch = prompts(config, documents)
    empty = dataclasses.replace(batch, segment_ids=np.zeros_like(batch.segment_ids))
    with pytest.raises(InputError, match="one document a row"):
        generate_tokens(model, empty, max_new_tokens=2)
