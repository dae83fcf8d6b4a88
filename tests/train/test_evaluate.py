import dataclasses

import jax
import numpy as np
import pytest

from gemma4_jax.data.pipeline import eval_batches
from gemma4_jax.launch.run_config import model_config
from gemma4_jax.sharding import make_mesh
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.evaluate import decode_greedily, evaluate, read_greedily
from gemma4_jax.train.program import make_program
from gemma4_jax.train.state import create_state
from gemma4_jax.train.step import EvalOutput


@pytest.fixture
def mesh():
    return make_mesh({}, jax.devices()[:1])


@pytest.fixture
def held_out(shallow_config):
    shallow_config.eval.num_documents, shallow_config.eval.batch_size = 12, 4
    return eval_batches(shallow_config, model_config(shallow_config), Tokenizer.load("bundled"), 4)


@pytest.fixture
def eval_step(shallow_config, mesh):
    model = model_config(shallow_config)
    with jax.set_mesh(mesh):
        program = make_program(shallow_config, model, mesh)
        state = create_state(program.state, model, program.config)
        yield lambda batch: program.eval_step(state.trained, state.frozen, batch)


def test_one_pass_and_token_by_token_agree(eval_step, held_out, mesh):
    """What the model itself writes is made the truth: all is exact then, and all but one where one is changed."""
    batch, items = held_out[0]
    batch = dataclasses.replace(batch, tokens=decode_greedily(eval_step, batch, items, mesh))
    assert evaluate(eval_step, [(batch, items)], mesh)["exact_match"] == 1.0
    assert all(reading.is_right for reading in read_greedily(eval_step, batch, items, mesh))
    changed = batch.tokens.copy()
    changed[items[1].row, items[1].stop - 1] += 1
    batch = dataclasses.replace(batch, tokens=changed)
    expected = [i != 1 for i in range(len(items))]
    assert evaluate(eval_step, [(batch, items)], mesh)["exact_match"] == np.mean(expected)
    assert [reading.is_right for reading in read_greedily(eval_step, batch, items, mesh)] == expected


def test_a_reader_of_known_mistakes_is_scored_exactly(held_out, mesh):
    """A stand-in that goes on from a true prefix with the truth, but for some items at some place of the answer."""
    batch, items = held_out[0]
    mistakes = {(item.row, item.start + i % (item.stop - item.start)) for i, item in enumerate(items) if i % 3 == 0}

    def forward(given):
        tokens = np.asarray(given.tokens)
        greedy = np.zeros_like(tokens)
        for row, segments in enumerate(np.asarray(given.segment_ids)):
            is_true = True
            for t in range(len(segments) - 1):
                if t == 0 or segments[t] != segments[t - 1]:
                    is_true = True
                is_true &= bool(tokens[row, t] == batch.tokens[row, t])
                greedy[row, t] = batch.tokens[row, t + 1] if is_true and (row, t + 1) not in mistakes else 999
        return EvalOutput(np.float32(1), np.float32(1), greedy)

    scores = evaluate(forward, [(batch, items)], mesh)
    readings = read_greedily(forward, batch, items, mesh)
    assert [reading.is_right for reading in readings] == [i % 3 != 0 for i in range(len(items))]
    assert scores["exact_match"] == np.mean([reading.is_right for reading in readings])
    right = next(reading for reading in readings if reading.is_right)
    assert Tokenizer.load("bundled").decode(right.tokens) == right.item.text


def test_blanking_changes_patches_and_nothing_else(held_out, mesh):
    seen = []

    def forward(given):
        seen.append(jax.device_get(given))
        return EvalOutput(np.float32(2), np.float32(4), np.zeros_like(given.tokens))

    scores = evaluate(forward, held_out, mesh, are_images_blank=True)
    assert scores == {"loss": 0.5, "exact_match": 0.0}
    for (batch, _), given in zip(held_out, seen, strict=True):
        assert np.all(given.patches == 128)
        for name in ("tokens", "loss_weights", "patch_positions", "image_slots"):
            np.testing.assert_array_equal(getattr(given, name), getattr(batch, name))
