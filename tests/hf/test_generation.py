"""Greedy generation, token for token, beside the reference on prompts that no golden file holds."""

import numpy as np
import pytest

from gemma4_jax.generation import generate_tokens
from tests.hf import samples

pytest.importorskip("torch")
reference = pytest.importorskip("tests.hf.reference")

NEW_TOKENS = 40
"""More than three windows."""


@pytest.mark.slow
@pytest.mark.parametrize("size", samples.OFFICIAL_SIZES)
def test_token_for_token(size):
    config = samples.shrink(size)
    weights = samples.restless_weights(config, seed=4)
    rng = np.random.default_rng(11)
    documents = [
        [[2, *rng.integers(15, 140, 55).tolist()]],
        [[2, 20, 21], samples.image(rng, config, 6, 7), rng.integers(15, 140, 3).tolist()],
        [[2, 20], samples.image(rng, config, 1, 3), [77, 78], samples.image(rng, config, 4, 2)],
        [[2]],
    ]
    batch = samples.batch([[document] for document in documents], config)
    given = generate_tokens(samples.model(config, weights), batch, max_new_tokens=NEW_TOKENS)
    theirs = reference.build(config, weights)
    for row, document in zip(given, documents, strict=True):
        assert row == reference.generate(theirs, document, config, NEW_TOKENS)
