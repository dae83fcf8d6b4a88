"""What the reference computed once on models shrunk from the official sizes (tests/golden/make.py), without torch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.hf.names import tensors
from tests.hf import samples

GOLDEN = Path(__file__).parents[1] / "golden"

# float32 on the CPU against float64 of the reference: the largest measured error of logits is 7.5e-7 of the largest
# logit, and the reference's own 1.4e-6; of a gradient 5e-6 of its largest entry, and the reference's own 8e-6.
LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 5e-5


@pytest.mark.parametrize("size", samples.GOLDEN)
def test_logits(size):
    config = samples.variant(size)
    expected = np.load(GOLDEN / f"{size}.npz")["logits"]
    model = samples.model(config, samples.lively_weights(config))
    documents = samples.all_documents(config)
    rows = np.asarray(samples.logits(model, jax.tree.map(jnp.asarray, samples.batch([[d] for d in documents], config))))
    lengths = [len(samples.example(document, config).tokens) for document in documents]
    given = np.concatenate([row[:length] for row, length in zip(rows, lengths, strict=True)])[
        :, :: samples.GOLDEN_STRIDE
    ]
    assert np.abs(given - expected).max() <= LOGITS_TOLERANCE * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("size", samples.GOLDEN)
def test_loss_and_gradients(size):
    config = samples.variant(size)
    golden = np.load(GOLDEN / f"{size}.npz")
    model = samples.model(config, samples.lively_weights(config))
    rows = samples.batch([[document] for document in samples.all_documents(config)], config)
    loss, gradients = samples.loss_and_gradients(model, rows)
    assert loss == pytest.approx(golden["loss"], rel=LOGITS_TOLERANCE)
    table = {tensor.name: tensor for tensor in tensors(config)}
    for name, (norm, projection) in zip(golden["names"], golden["gradients"], strict=True):
        tensor = table.pop(name)
        ours = gradients[tensor.path] if tensor.index is None else gradients[tensor.path][tensor.index]
        given = samples.summarize_gradient(name, tensor.to_theirs(ours))
        assert np.abs(np.subtract(given, (norm, projection))).max() <= GRADIENT_TOLERANCE * norm, name
    # What is left has no gradient there: it must not be trained here.
    assert not {tensor.path for tensor in table.values()} & gradients.keys()
