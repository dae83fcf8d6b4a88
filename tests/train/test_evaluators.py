import dataclasses

import jax
import numpy as np
import pytest

from gemma4_jax.data.example import Example
from gemma4_jax.errors import InputError
from gemma4_jax.sharding import make_mesh
from gemma4_jax.tokenizer import Tokenizer
from gemma4_jax.train.evaluators import EVALUATORS, Evaluator, Setting, make_evaluator
from gemma4_jax.train.evaluators.answers import Answers, find_items, is_exact
from gemma4_jax.train.loop import train
from gemma4_jax.train.program import make_program
from gemma4_jax.train.state import create_state
from gemma4_jax.train.step import EvalOutput
from tests.train.tiny import typed


@pytest.fixture
def setting(shallow_config) -> Setting:
    shallow_config.evaluators.eval.num_documents, shallow_config.evaluators.eval.batch_size = 12, 4
    program = make_program(typed(shallow_config), make_mesh({}, jax.devices()[:1]))
    return Setting(program, Tokenizer.load("bundled"), lambda: None)


@pytest.fixture
def answers(setting) -> Answers:
    evaluator = make_evaluator(setting.program.config.evaluators["eval"], setting)
    assert isinstance(evaluator, Answers)
    return evaluator


def rewritten(answers: Answers, texts: list[np.ndarray]) -> Answers:
    """The same questions with other answers, of the same lengths."""
    batches, rest = [], iter(texts)
    for batch, items in answers.batches:
        tokens, changed = batch.tokens.copy(), []
        for item in items:
            changed.append(dataclasses.replace(item, answer=next(rest)))
            tokens[item.row, item.start : item.stop] = changed[-1].answer
        batches.append((dataclasses.replace(batch, tokens=tokens), changed))
    answers.batches = batches
    return answers


@pytest.mark.slow
def test_one_pass_and_token_by_token_agree(answers, setting):
    """What the model itself writes is made the truth: all is exact then, and all but one where one is changed."""
    program = setting.program
    with jax.set_mesh(program.mesh):
        state = create_state(program.state, program.config)
        items = [item for _, items in answers.batches for item in items]
        assert len(items) == answers.num_items == 12
        written = [item.answer.copy() for item in items]
        for place in range(max(map(len, written))):  # each pass decides one more token of every answer
            batches = rewritten(answers, written).batches
            greedy = [answers_of(program, state, batch) for batch, _ in batches]
            flat = [
                output[item.row, item.start - 1 : item.stop - 1]
                for output, (_, items) in zip(greedy, batches, strict=True)
                for item in items
            ]
            for answer, chosen in zip(written, flat, strict=True):
                answer[place : place + 1] = chosen[place : place + 1]
        answers = rewritten(answers, written)
        assert answers.measure(state)["exact_match"] == 1.0
        items = [item for _, items in answers.batches for item in items]
        assert all(reading.is_right for reading in answers.read(state, items))
        written[1] = written[1].copy()
        written[1][-1] += 1
        answers = rewritten(answers, written)
        items = [item for _, items in answers.batches for item in items]
        expected = [i != 1 for i in range(len(items))]
        assert answers.measure(state)["exact_match"] == pytest.approx(np.mean(expected))
        assert [reading.is_right for reading in answers.read(state, items)] == expected


def answers_of(program, state, batch) -> np.ndarray:
    return jax.device_get(program.eval_step(state.trained, state.frozen, batch).greedy)


def test_blanking_changes_patches_and_nothing_else(answers):
    seen = []

    def forward(trained, frozen, given):
        seen.append(jax.device_get(given))
        return EvalOutput(np.float32(2), np.float32(4), np.zeros_like(given.tokens))

    answers._forward = forward
    state = answers._setting.program.state
    assert answers.measure(state, are_images_blank=True) == {"loss": 0.5, "exact_match": 0.0}
    for (batch, _), given in zip(answers.batches, seen, strict=True):
        assert np.all(given.patches == 128)
        for name in ("tokens", "loss_weights", "patch_positions", "image_slots"):
            np.testing.assert_array_equal(getattr(given, name), getattr(batch, name))


def example(learned: str) -> Example:
    """A document of a token for each letter: x carries loss."""
    return Example(np.arange(len(learned), dtype=np.int32), np.array([c == "x" for c in learned]), (), "d")


@pytest.mark.parametrize(
    ("learned", "answer"),
    [
        (".....xxxx", (5, 8)),  # <bos>, a question, an answer, <eos>
        ("..xx..xxx", (6, 8)),  # of a conversation, the last turn
        (".xxxxxxxx", None),  # all of it is learned: there is no question
        ("xxxxxxxxx", None),  # a later piece of a long text
        (".....xx..", None),  # what the document ends with is not learned
        (".........", None),
    ],
)
def test_the_answer_is_what_is_learned_last_after_something_given(learned, answer):
    items = find_items([[example("..xx"), example(learned)]])
    assert len(items) == 1 + (answer is not None)
    if answer is not None:
        start, stop = answer
        assert (items[1].start, items[1].stop) == (4 + start, 4 + stop)
        assert items[1].prompt.tokens.tolist() == list(range(start))
        greedy = np.full((1, 20), 999)
        greedy[0, 4 + start - 1 : 4 + stop - 1] = range(start, stop)
        assert is_exact(greedy, items[1])
        greedy[0, 4 + stop - 2] = 0
        assert not is_exact(greedy, items[1])


def test_a_kind_that_is_not_there_or_an_option_that_nobody_takes_is_one_sentence(setting):
    config = setting.program.config.evaluators["eval"]
    with pytest.raises(InputError, match=r"evaluators\.eval\.kind='anwers'.*nearest is answers"):
        make_evaluator(dataclasses.replace(config, kind="anwers"), setting)
    with pytest.raises(InputError, match=r"evaluators\.eval\.options=\{'beams': 3\}.*takes none"):
        make_evaluator(dataclasses.replace(config, options={"beams": 3}), setting)


class Norms(Evaluator):
    """A stranger's evaluator: how large the embeddings are."""

    def __init__(self, config, setting):
        self.scale = config.options["scale"]

    def measure(self, state):
        table = state.model["embedder"]["table"].get_value()
        return {"embedding_norm": self.scale * float(jax.numpy.linalg.norm(table))}


@pytest.mark.slow
def test_a_stranger_brings_an_evaluator(shallow_config, monkeypatch):
    monkeypatch.setitem(EVALUATORS, "norms", Norms)
    shallow_config.evaluators = {"size": {"kind": "norms", "every_steps": 1, "options": {"scale": 2.0}}}
    shallow_config.train.num_steps, shallow_config.optimizer.warmup_steps = 2, 0
    summary = train(typed(shallow_config))
    assert summary["size_embedding_norm"] > 0
    assert "eval_loss" not in summary
