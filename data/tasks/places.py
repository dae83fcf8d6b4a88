"""Where the images, sounds and videos of a conversation stand in its messages."""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gemma4_jax.data.document import Image, Sound
from gemma4_jax.data.tasks.media import as_image, as_sound, decode_base64
from gemma4_jax.data.tasks.video import as_video
from gemma4_jax.errors import InputError

MAX_PARTS = 4096
"""Of a message."""

Message = dict[str, Any]

_CALLED = {"image": "images", "audio": "sounds", "video": "videos"}
_KINDS = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "video",
    "video_url": "video",
}
"""Type of a part -> what it is."""


def place(
    messages: list[Message], record: Mapping[str, Any], soft_tokens_per_frame: int, *, marks_images: bool
) -> tuple[list[Message], tuple[Image | Sound, ...], tuple[tuple[str, ...], ...]]:
    """Messages in which {"type": "image"} and the like stand for what is there, and all that in order.

    Args:
      messages: as the forms of `chat` give them.
      record: whose columns image, images, audio, audios, video and videos hold what the messages have no content of.
      soft_tokens_per_frame: budget of each frame of a video.
      marks_images: whether "<image>" is a place even where no column has images.
    Returns:
      (messages, images and sounds and frames, the times of the frames of each video).
    Raises:
      InputError: a place has nothing to stand there, or something has no place; or a part is of no known form.
    """
    beside = {
        "image": [*_listed(record.get("image")), *_listed(record.get("images"))],
        "audio": [*_listed(record.get("audio")), *_listed(record.get("audios"))],
        "video": _videos(record),
    }
    marked = [kind for kind, given in beside.items() if given or (kind == "image" and marks_images)]
    placed = [_numbered(number, _with_parts, message, marked) for number, message in enumerate(messages)]
    for kind, given in beside.items():
        num_places = sum(part == {"type": kind} for part in _parts(placed))
        first = next((i for i, message in enumerate(placed) if message["role"] == "user"), None)
        if given and not num_places and first is not None:  # nothing says where: before all that the user says
            content = placed[first].get("content", [])
            said = [{"type": "text", "text": content}] if isinstance(content, str) else content
            placed[first] = placed[first] | {"content": [{"type": kind} for _ in given] + said}
        elif num_places != len(given):
            what = _CALLED[kind]
            raise InputError(
                f"its messages have {num_places} places for {what}, and {len(given)} {what} are beside them."
            )
    waiting = {kind: iter(given) for kind, given in beside.items()}
    segments: list[Image | Sound] = []
    videos = []
    for part in _parts(placed):
        kind = part["type"]
        if kind in waiting:
            given = part.pop("given") if "given" in part else next(waiting[kind])
            if kind == "video":
                frames, fps, timestamps = given
                shown = as_video(frames, fps, timestamps, soft_tokens_per_frame)
                segments += shown.frames
                videos.append(shown.times)
            else:
                segments.append(as_image(given) if kind == "image" else as_sound(given))
    return placed, tuple(segments), tuple(videos)


def _videos(record: Mapping[str, Any]) -> list[tuple[Any, Any, Any]]:
    """Of each video beside the messages: what it is, and its fps and timestamps.

    Raises:
      InputError: there are not as many of these as videos.
    """
    several = record.get("videos", [])
    given = [*([record["video"]] if "video" in record else ()), *(several if isinstance(several, list) else [several])]
    fps, timestamps = record.get("fps"), record.get("timestamps")
    are_nested = isinstance(timestamps, list) and any(isinstance(times, list) for times in timestamps)
    each = {
        "fps": list(fps) if isinstance(fps, list) else [fps] * len(given),
        "timestamps": list(timestamps or ()) if are_nested else [timestamps] * len(given),
    }
    for name, values in each.items():
        if given and len(values) != len(given):
            raise InputError(f"{name} are given for {len(values)} videos, and there are {len(given)}.")
    return list(zip(given, each["fps"], each["timestamps"], strict=False))


def _numbered(number: int, function: Any, message: Message, *arguments: Any) -> Message:
    try:
        return function(message, *arguments)
    except InputError as error:
        raise InputError(f"message {number}: {error}") from error


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _parts(messages: list[Message]) -> Iterator[Message]:
    return itertools.chain.from_iterable(
        message["content"] for message in messages if isinstance(message.get("content"), list)
    )


def _with_parts(message: Message, marked: list[str]) -> Message:
    """A message whose content is a text, or parts of {"type": ...} with "text", or with what is "given" there."""
    content = message.get("content")
    if isinstance(content, list):
        return message | {"content": list(map(_part, content))}
    if isinstance(content, str) and message["role"] != "assistant" and marked:
        pieces = re.split(f"<({'|'.join(marked)})>", content, maxsplit=MAX_PARTS)  # every second is a mark
        parts = [{"type": piece} if i % 2 else {"type": "text", "text": piece} for i, piece in enumerate(pieces)]
        if len(parts) > 1:
            return message | {"content": [part for part in parts if part.get("text") != ""]}
    return message


def _part(given: Any) -> Message:
    if isinstance(given, str):
        return {"type": "text", "text": given}
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(given.get("text"), str):
        return {"type": "text", "text": given["text"]}
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(
            f'a part is {given!r:.100}, and must be {{"type": "text", "text": TEXT}}, {{"type": "image"}} with its '
            "content or a column of images, or the same of audio or video."
        )
    content = _content_of(given, kind)
    if content is not None and _KINDS[kind] == "video":
        content = content, given.get("fps"), given.get("timestamps")
    return {"type": _KINDS[kind]} | ({} if content is None else {"given": content})


def _content_of(part: Mapping[str, Any], kind: str) -> Any:
    """What stands in a part; None if it comes from a column."""
    content = next((part[name] for name in (kind, _KINDS[kind], "path", "url") if name in part), None)
    if isinstance(content, Mapping):  # {"url": ...}, or {"data": ..., "format": ...} of a sound
        content = next((content[name] for name in ("url", "data") if name in content), content)
        return decode_base64(content) if kind == "input_audio" and isinstance(content, str) else content
    return decode_base64(part["base64"]) if content is None and isinstance(part.get("base64"), str) else content
