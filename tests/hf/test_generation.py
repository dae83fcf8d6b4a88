"""Greedy generation, token for token, beside the reference on prompts that no golden file holds."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import gemma4_jax
from gemma4_jax import sizes
from gemma4_jax.generation import Sampler, _filter, generate_tokens
from tests.hf import checkpoints, samples, sounds

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
reference = pytest.importorskip("tests.hf.reference")

NEW_TOKENS = 40
"""More than two windows."""


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


@pytest.mark.slow
def test_answers_about_sounds(tmp_path):
    """From a checkpoint on disk and sounds of several lengths, prompts of several lengths in one batch."""
    config = dataclasses.replace(
        samples.variant("e2b_audio"),
        text=dataclasses.replace(samples.variant("e2b_audio").text, vocab_size=1024),
        tokens=sizes.quickstart().tokens,
    )
    model, processor = gemma4_jax.load_hf(checkpoints.write_release(tmp_path / "in", config))
    rng = np.random.default_rng(8)
    short, middle, long = (sounds.make(rng, length) for length in (900, 12_640, 40_000))
    prompts = ["Hear <|audio|> and <|audio|>: which?", "<|audio|>", "Hi."]
    audios = [[long, short], [middle], []]
    batch = processor(prompts, audios=audios)
    given = generate_tokens(model, batch, max_new_tokens=NEW_TOKENS)
    theirs = reference.build(config, samples.restless_weights(config))
    for row, prompt, heard in zip(given, prompts, audios, strict=True):
        alone = processor(prompt, audios=heard)
        document = {"input_ids": alone.tokens, "attention_mask": alone.segment_ids}
        if heard:
            is_mine = np.arange(1, len(heard) + 1)[:, None] == alone.frame_sound_ids
            features = np.zeros((*is_mine.shape, alone.audio_features.shape[2]), np.float32)
            is_frame = np.arange(is_mine.shape[1]) < is_mine.sum(axis=1, keepdims=True)
            features[is_frame] = alone.audio_features[0, alone.frame_sound_ids[0] > 0]
            document |= {"input_features": features, "input_features_mask": is_frame}
        assert row == reference.wait_for_first(theirs, document, NEW_TOKENS)
    texts = gemma4_jax.generate(model, processor, prompts, audios=audios, max_new_tokens=5)
    assert texts[0] == processor.decode(given[0][:5])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 3, 1.0), (1.0, 0, 0.8), (1.0, 0, 1e-6), (2.0, 5, 0.6), (1.0, 200, 0.9), (0.3, 2, 0.5)],
)
def test_same_tokens_are_drawn_from(temperature, top_k, top_p):
    """Temperature, then top-k, then top-p, with equal logits at the borders."""
    rng = np.random.default_rng(12)
    logits = np.round(rng.standard_normal((40, 160)) * 4).astype(np.float32) / 2
    theirs = torch.from_numpy(logits)
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        theirs = warper(None, theirs)
    sampler = Sampler(jnp.float32(temperature), jnp.int32(top_k or 160), jnp.float32(1 - top_p))
    given = np.asarray(_filter(jnp.asarray(logits), sampler))
    # Which of several equal tokens top-p leaves out is a matter of the sorting; how many is not.
    np.testing.assert_allclose(np.sort(given), np.sort(theirs.numpy()), rtol=1e-6)
