"""Sounds longer than the audio tower hears at once, in pieces."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from gemma4_jax.audio.features import SAMPLE_RATE
from gemma4_jax.data.document import Conversation, Document, Sound
from gemma4_jax.data.sounds import MAX_PIECE_SECONDS, whole_length
from gemma4_jax.errors import InputError


def cut_sounds(document: Document) -> Document:
    """The document with each sound of more than 30 s in pieces, one after another, where it stood.

    There are as few pieces as hold it, all of the same whole number of seconds but for the last, which is shorter. Each
    is a sound of its own, between its own marks.

    Raises:
      InputError: a sound is longer than `MAX_SECONDS`, or its file cannot be read.
    """
    if not any(isinstance(segment, Sound) for segment in document.segments):
        return document
    cut = [_pieces(segment) if isinstance(segment, Sound) else [segment] for segment in document.segments]
    counts = iter([len(pieces) for pieces in cut if isinstance(pieces[0], Sound)])
    conversation = document.conversation and _with_places(document.conversation, counts)
    return dataclasses.replace(
        document, segments=tuple(piece for pieces in cut for piece in pieces), conversation=conversation
    )


def _with_places(conversation: Conversation, counts: Iterator[int]) -> Conversation:
    """A conversation with so many places where each sound had one."""

    def spread(part: Any) -> list[Any]:
        is_sound = isinstance(part, Mapping) and part.get("type") == "audio"
        return [part] * (next(counts, 1) if is_sound else 1)

    messages = [
        {**message, "content": [copy for part in message["content"] for copy in spread(part)]}
        if isinstance(message.get("content"), list)
        else message
        for message in conversation.messages
    ]
    return dataclasses.replace(conversation, messages=tuple(messages))


def _pieces(sound: Sound) -> list[Sound]:
    if isinstance(sound.content, str):  # which `Encoder` refuses
        return [sound]
    try:
        seconds = whole_length(sound.content) / SAMPLE_RATE
    except InputError as error:
        raise InputError(f"{sound.name}: {error}" if sound.name else str(error)) from error
    number = math.ceil(seconds / MAX_PIECE_SECONDS)
    if number <= 1:
        return [sound]
    step = math.ceil(seconds / number)
    starts = range(0, math.ceil(seconds), step)
    return [dataclasses.replace(sound, seconds=(start, min(start + step, math.ceil(seconds)))) for start in starts]
