"""A record of any known shape, each made a document by the task of its shape."""

from collections.abc import Collection, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from gemma4_jax.data.document import Document, Pair
from gemma4_jax.data.example import SizedExample
from gemma4_jax.data.signatures import parameters_of
from gemma4_jax.data.tasks.caption import caption
from gemma4_jax.data.tasks.chat import FORMS, chat
from gemma4_jax.data.tasks.interleaved import interleaved
from gemma4_jax.data.tasks.preference import preference
from gemma4_jax.data.tasks.segments import segments
from gemma4_jax.data.tasks.speech import speech
from gemma4_jax.data.tasks.text import text
from gemma4_jax.data.tasks.video import SOFT_TOKENS_PER_FRAME, video
from gemma4_jax.errors import InputError

TRANSCRIPTS = ("text", "transcript", "transcription", "sentence")
"""What sets of speech call what is said."""

SHAPES: dict[tuple[str, ...], str] = {
    ("segments",): "segments",
    **dict.fromkeys(FORMS, "chat"),
    ("texts", "images"): "interleaved",
    ("image", "text"): "caption",
    ("image", "caption"): "caption",
    **{("audio", said): "speech" for said in TRANSCRIPTS},
    ("frames", "text"): "video",
    ("chosen", "rejected"): "preference",
    ("text",): "text",
}
"""Columns that a record of a shape has -> its task."""


def auto(
    *, last_turn_only: bool = False, soft_tokens_per_frame: int = SOFT_TOKENS_PER_FRAME, **record: Any
) -> Document | Pair:
    """The document, or the pair, of a record whose columns tell what it is: one of `SHAPES`, with any columns beside.

    One of prepared data, which is encoded already, is taken as it is.

    A text beside a conversation, or beside segments, is what somebody wrote of it, and is not read.

    Args:
      last_turn_only: of conversations, see `chat`.
      soft_tokens_per_frame: of videos, see `video`.
      record: a null is as good as nothing.
    Raises:
      InputError: it is of no known shape, or of several.
    """
    if isinstance(record.get("encoded"), SizedExample):
        return Document((), encoded=record["encoded"])
    given = {name: value for name, value in record.items() if value is not None}
    shapes = [shape for shape in SHAPES if given.keys() >= set(shape)]
    tasks = {SHAPES[shape] for shape in shapes}
    if len(tasks) > 1:
        tasks -= {"text"}  # an image or a sound has a text as well, and sets of instructions their rendering
    if tasks == {"interleaved", "chat"} and isinstance(given["texts"], list):
        is_chat = any(isinstance(text, Mapping) for text in given["texts"])
        tasks = {"chat"} if is_chat else {"interleaved"}
    if "chat" in tasks:
        tasks -= {"caption", "speech"}  # its image or its sound, and its rendering
    if "preference" in tasks:
        tasks = {"preference"}  # and what stands beside is one of the answers, or of both
    if len(tasks) != 1:
        raise InputError(_refusal(given, sorted(tasks)))
    match tasks.pop():
        case "segments":
            return segments(segments=given["segments"])
        case "chat":
            return chat(last_turn_only=last_turn_only, soft_tokens_per_frame=soft_tokens_per_frame, **given)
        case "interleaved":
            return interleaved(given["texts"], given["images"])
        case "speech":
            said = next(given[name] for name in TRANSCRIPTS if name in given)
            return speech(given["audio"], said, given.get("prompt", ""))
        case "video":
            beside = {name: given[name] for name in ("fps", "timestamps", "prompt") if name in given}
            return video(given["frames"], given["text"], soft_tokens_per_frame=soft_tokens_per_frame, **beside)
        case "preference":
            return preference(**{name: given[name] for name in parameters_of(preference) if name in given})
        case "caption":
            return caption(given["image"], given.get("text", given.get("caption")), given.get("prompt", ""))
        case _:
            return text(given["text"])


def check_columns(columns: Collection[str]) -> None:
    """Refuses a source none of whose records can be of a known shape.

    Args:
      columns: that its records have, by the names of the tasks.
    Raises:
      InputError: no shape has these.
    """
    if "encoded" not in columns and not any(set(shape) <= set(columns) for shape in SHAPES):
        raise InputError(_refusal(columns, []))


def _refusal(record: Collection[str], tasks: list[str]) -> str:
    columns = ", ".join(map(str, record)) or "none"
    if tasks:
        return f"its columns, {columns:.200}, are of several shapes: name its task, one of {', '.join(tasks)}."
    near = max(SHAPES, key=lambda shape: _likeness(shape, [str(column) for column in record]))
    known = f"{_accepted()}, by these names or those in `columns`; the nearest is {' and '.join(near)}"
    return f"its columns, {columns:.200}, are of no known shape: those are {known}."


def _accepted() -> str:
    """The shapes, those together that differ in their last column."""
    ends: dict[tuple[str, ...], list[str]] = {}
    for *first, last in SHAPES:
        ends.setdefault(tuple(first), []).append(last)
    alone = ends.pop(())
    return "; ".join([*alone, *(" and ".join((*first, " or ".join(last))) for first, last in ends.items())])


def _likeness(shape: Sequence[str], columns: Sequence[str]) -> float:
    """How much the columns of a shape are like those that there are, between 0 and 1."""
    alike = [max((SequenceMatcher(None, name, column).ratio() for column in columns), default=0.0) for name in shape]
    return sum(alike) / len(alike)
