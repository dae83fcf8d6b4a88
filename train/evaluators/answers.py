"""Held-out loss, and how many of the held-out answers the model gives exactly.

An answer is what a document has its model learn last, after something that it is only given: the prompt. Greedy
decoding gives exactly the truth if and only if, with the truth given, the likeliest token is the true one at every
position of the answer: as long as every choice so far was the true one, greedy decoding has the very prefix that the
packed row has, and at the first other choice both have failed. So `measure` needs one forward pass for all documents of
a batch. What the model says where it is wrong, the report asks the decoder of `generation`.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from gemma4_jax.batch import Batch
from gemma4_jax.data.assemble import assemble
from gemma4_jax.data.example import Example
from gemma4_jax.data.images import join_patches
from gemma4_jax.data.pack import RowShape
from gemma4_jax.data.pipeline import held_out_rows, held_out_source
from gemma4_jax.errors import InputError
from gemma4_jax.generation import generate_tokens
from gemma4_jax.run_config import EvaluatorConfig
from gemma4_jax.sharding import batch_sharding
from gemma4_jax.train.evaluators import Evaluator, Setting
from gemma4_jax.train.state import TrainState

BLANK = 128
"""What every pixel becomes where images are blanked: the middle of its range."""

NUM_READINGS = 24
"""Held-out answers that the report shows."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of an evaluation batch.

    Attributes:
      row: of the batch.
      start, stop: the tokens start..stop-1 of the row are the answer.
      prompt: what comes before them in their document.
      answer: [n] int32, these tokens.
    """

    row: int
    start: int
    stop: int
    prompt: Example
    answer: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the model answers to one held-out question.

    Attributes:
      question: text of the prompt, without its images.
      truth, text: the answer as it should be, and as greedy decoding writes it.
      is_right: whether they are the same, token by token.
      pixels: uint8 [height, width, 3], the last image of the prompt as the model sees it; None if it has none.
    """

    question: str
    truth: str
    text: str
    is_right: bool
    pixels: np.ndarray | None


def find_items(rows: Sequence[Sequence[Example]]) -> list[Item]:
    """The questions in packed rows: one for each document with an answer."""
    items = []
    for b, row in enumerate(rows):
        start = 0
        for example in row:
            if (answer := _answer_of(example)) is not None:
                first, stop = answer
                prompt = dataclasses.replace(
                    example, tokens=example.tokens[:first], carries_loss=example.carries_loss[:first]
                )
                items.append(Item(b, start + first, start + stop, prompt, example.tokens[first:stop]))
            start += len(example.tokens)
    return items


def _answer_of(example: Example) -> tuple[int, int] | None:
    """Where in a document its answer begins and ends, without the <eos> behind it; None if it has none."""
    learned = np.flatnonzero(example.carries_loss[:-1])
    if not learned.size:
        return None
    stop = int(learned[-1]) + 1
    given = np.flatnonzero(~example.carries_loss[:stop])
    first = int(given[-1]) + 1 if given.size else 0
    # <bos> alone is no prompt; and of what follows the answer nothing may belong to the prompt, as an image would.
    return (first, stop) if first > 1 and stop == len(example.tokens) - 1 else None


class Answers(Evaluator):
    """Held-out loss and exact answers.

    Args of the constructor:
      setting: what it works with.
      rows: packed documents.
      batch_size: rows of a batch; the last batch is filled up with rows of padding.
    """

    def __init__(self, setting: Setting, rows: Sequence[list[Example]], batch_size: int) -> None:
        self._setting = setting
        rows = [*rows, *([[]] * (-len(rows) % batch_size))]
        shape, tokens = setting.program.row, setting.tokenizer.tokens
        self.batches: list[tuple[Batch, list[Item]]] = []
        for start in range(0, len(rows), batch_size):
            batch_rows = rows[start : start + batch_size]
            self.batches.append((assemble(batch_rows, shape, tokens), find_items(batch_rows)))
        self._forward: Any = None

    @property
    def num_items(self) -> int:
        """Documents with an answer."""
        return sum(len(items) for _, items in self.batches)

    def compile(self, state: TrainState) -> None:
        batch = put_batch(self.batches[0][0], self._setting.program.mesh)
        self._forward = self._setting.program.eval_step.lower(state.trained, state.frozen, batch).compile()

    def measure(self, state: TrainState, *, are_images_blank: bool = False) -> dict[str, float]:
        """Evaluates a model.

        Args:
          state: of it.
          are_images_blank: replace every image by grey: what is answered then, is guessed.
        Returns:
          loss, mean cross entropy over loss weights, in nats; and, where there are answers, exact_match, the share of
          them that greedy decoding gives exactly.
        """
        if self._forward is None:
            self.compile(state)
        outputs = []
        for batch, _ in self.batches:
            self._setting.pause()
            if are_images_blank:
                grey: Any = np.full_like(batch.patches, BLANK)
                batch = dataclasses.replace(batch, patches=grey)
            outputs.append(self._forward(state.trained, state.frozen, put_batch(batch, self._setting.program.mesh)))
            if len(outputs) > 1:  # one waits while one is worked on; more would only hold memory, and a signal up
                jax.block_until_ready(outputs[-2])
        outputs = jax.device_get(outputs)
        loss = sum(output.loss_sum for output in outputs) / sum(output.weight_sum for output in outputs)
        right = [
            is_exact(output.greedy, item)
            for (_, items), output in zip(self.batches, outputs, strict=True)
            for item in items
        ]
        return {"loss": float(loss)} | ({"exact_match": float(np.mean(right))} if right else {})

    def finish(self, state: TrainState) -> tuple[dict[str, float], list[Reading]]:
        """Adds what is guessed with images blanked, and shows some answers."""
        figures: dict[str, float] = {}
        if self.num_items:
            figures["answers"] = self.num_items
        if self.num_items and any(batch.patch_image_ids.any() for batch, _ in self.batches):
            blank = self.measure(state, are_images_blank=True)
            figures["exact_match_blank_images"] = blank["exact_match"]
        items = [item for _, items in self.batches for item in items][:NUM_READINGS]
        return figures, self.read(state, items)

    def read(self, state: TrainState, items: Sequence[Item]) -> list[Reading]:
        """What the model writes after the prompts of some items; nothing where positions are spread over devices."""
        program, tokenizer = self._setting.program, self._setting.tokenizer
        if not items or program.mesh.shape["context"] > 1:
            return []
        self._setting.pause()
        prompts = assemble([[item.prompt] for item in items], _room_for(items, program.row), tokenizer.tokens)
        model = nnx.merge(program.graphdef, state.trained, state.frozen)
        longest = max(len(item.answer) for item in items)
        written = generate_tokens(model, prompts, max_new_tokens=longest)  # each ends with a token of its own
        return [self._reading(item, ids) for item, ids in zip(items, written, strict=True)]

    def _reading(self, item: Item, written: list[int]) -> Reading:
        tokenizer, vision = self._setting.tokenizer, self._setting.program.config.model.vision
        truth = item.answer.tolist()
        end = written.index(truth[-1]) + 1 if truth[-1] in written else len(written)
        pixels = None
        if item.prompt.images and vision is not None:
            image = item.prompt.images[-1]
            pixels = join_patches(image.patches, image.positions, patch_size=vision.patch_size)
        special = set(vars(tokenizer.tokens).values())
        question = tokenizer.decode([token for token in item.prompt.tokens.tolist() if token not in special])
        right, text = (tokenizer.decode(ids).rstrip("\n") for ids in (truth, written[:end]))
        return Reading(question, right, text, written[: len(truth)] == truth, pixels)


def make_answers(config: EvaluatorConfig, setting: Setting) -> Answers | None:
    """The evaluator of `config.source`, or of the first source that holds documents back; None if none does.

    Raises:
      InputError: the source holds nothing back, or nothing of it can be used.
    """
    if config.options:
        raise InputError(f"{config.section}.options={dict(config.options)} is not possible: answers takes none.")
    run = setting.program.config
    source = config.source or held_out_source(run.data)
    if source is None:
        return None
    rows = held_out_rows(run, setting.tokenizer, source, config.num_documents)
    return Answers(setting, rows, config.batch_size)


def is_exact(greedy: np.ndarray, item: Item) -> bool:
    """Whether greedy decoding gives the answer of one item, by the argument at the top of this module.

    Args:
      greedy: [B, T] likeliest next tokens, with the truth given.
      item: of the batch.
    """
    return bool(np.array_equal(greedy[item.row, item.start - 1 : item.stop - 1], item.answer))


def _room_for(items: Iterable[Item], row: RowShape) -> RowShape:
    """A row that holds the longest prompt."""
    prompts = [item.prompt for item in items]
    patches = max(sum(len(image.patches) for image in prompt.images) for prompt in prompts)
    return dataclasses.replace(row, tokens=max(len(prompt.tokens) for prompt in prompts), patches=patches)


def put_batch(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """Spreads a batch that every process holds whole over the mesh."""

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])

    return jax.tree.map(put, batch)
