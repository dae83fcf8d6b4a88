import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.model import Gemma4
from tests.test_model import DOCUMENTS, SMALL, batch_of

TEXT = dataclasses.replace(SMALL, vision=None)
BATCH = batch_of([[DOCUMENTS[0]]])


@pytest.mark.parametrize("policy", ["none", "full"])
def test_what_is_computed_again_at_one_time_is_a_layer_and_not_a_period(policy):
    """Each layer of a period, of both stacks, and the projection of the per-layer embeddings; and always of an MLP."""
    text = TEXT.text
    assert text.attention_period > 1
    assert text.num_kv_shared_layers
    assert text.per_layer_embed_dim
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Gemma4(TEXT, nnx.Rngs(0), remat=policy)))
    program = jax.make_jaxpr(lambda state: nnx.merge(graphdef, state).hidden(BATCH)[0])(state)
    num_layers = 2 * text.attention_period  # of both stacks, as far as they are not scanned
    assert str(program).count("remat2[") == num_layers + (0 if policy == "none" else num_layers + 1)


def test_what_is_computed_again_is_what_was():
    model = Gemma4(TEXT, nnx.Rngs(0))
    again = Gemma4(TEXT, nnx.Rngs(0), remat="full")

    def gradient(model: Gemma4) -> nnx.State:
        return nnx.grad(lambda model: model.hidden(BATCH)[0].var())(model)

    given, expected = (jax.tree.leaves(nnx.jit(gradient)(model)) for model in (again, model))
    for value, other in zip(given, expected, strict=True):
        # float32 sums in another order: the largest measured error is 1e-6 of the largest entry.
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-5 * max(np.abs(other).max(), 1e-3))
