import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma4_jax.sizes import quickstart
from gemma4_jax.text.embedding import Embedder, PerLayerEmbedder

CONFIG = quickstart().text
PAD = 3
TOKENS = jnp.array([[5, PAD, 5, 8], [PAD, 8, 5, 0]])
OPTIONS = {"pad": PAD, "dtype": jnp.float32, "param_dtype": jnp.float32}


def test_a_token_is_its_row_times_the_root_of_the_width():
    embedder = Embedder(nnx.Rngs(0), CONFIG, **OPTIONS)
    np.testing.assert_array_equal(embedder(TOKENS), embedder.table[...][TOKENS] * CONFIG.embed_dim**0.5)


def test_the_root_is_rounded_to_the_compute_dtype():
    config = dataclasses.replace(CONFIG, embed_dim=1536)
    embedder = Embedder(nnx.Rngs(0), config, **OPTIONS | {"dtype": jnp.bfloat16})
    embedder.table[...] = jnp.ones_like(embedder.table[...])
    # Spec section 2: sqrt(1536) = 39.19 becomes 39.25.
    np.testing.assert_array_equal(embedder(TOKENS).astype(jnp.float32), 39.25)


def look_up(embedder: nnx.Module) -> jax.Array:
    inputs = (TOKENS,) if isinstance(embedder, Embedder) else (TOKENS, jnp.ones((*TOKENS.shape, CONFIG.embed_dim)))
    return embedder(*inputs)


@pytest.mark.parametrize("kind", [Embedder, PerLayerEmbedder])
def test_the_rows_of_tokens_that_are_not_padding_are_trained(kind):
    embedder = kind(nnx.Rngs(0), CONFIG, **OPTIONS)
    gradient = nnx.grad(lambda embedder: jnp.sum(look_up(embedder)))(embedder)["table"][...]
    rows = np.abs(gradient).reshape(CONFIG.vocab_size, -1).sum(axis=1)
    assert np.flatnonzero(rows).tolist() == [0, 5, 8]


def test_per_layer_embeddings_are_one_per_layer_from_token_and_context():
    embedder = PerLayerEmbedder(nnx.Rngs(0), CONFIG, **OPTIONS)
    x = jax.random.normal(jax.random.key(1), (*TOKENS.shape, CONFIG.embed_dim))
    given = embedder(TOKENS, x)
    width = CONFIG.per_layer_embed_dim
    assert given.shape == (CONFIG.num_layers, *TOKENS.shape, width)
    for layer in range(CONFIG.num_layers):
        by_context = x @ embedder.projection.kernel[...][:, layer] * CONFIG.embed_dim**-0.5
        by_context /= jnp.sqrt(jnp.mean(by_context**2, axis=-1, keepdims=True) + CONFIG.norm_eps)
        by_token = embedder.table[...][TOKENS, layer] * width**0.5
        # float32 sums in another order: the largest measured error is 7e-7.
        np.testing.assert_allclose(given[layer], (by_context + by_token) / 2**0.5, atol=2e-6)
