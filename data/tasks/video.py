"""A video as its frames, each after the time at which it stands, and what is said of it.

    {"frames": [IMAGE, IMAGE, ...], "fps": 2, "text": "A cat jumps."}

Films are not decoded: save their frames first. Source: Gemma4Processor of transformers 5.23, `replace_video_token`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.tasks.media import as_image
from gemma4_jax.data.tasks.text import as_text
from gemma4_jax.errors import InputError

MAX_FRAMES = 256
"""Of a video."""

SOFT_TOKENS_PER_FRAME = 70
"""Budget of a frame, as in the reference."""


class Video(NamedTuple):
    """Frames in order, and the time of each, such as 00:01."""

    frames: tuple[Image, ...]
    times: tuple[str, ...]


def video(
    frames: Any,
    text: Any,
    fps: Any = None,
    timestamps: Any = None,
    prompt: str = "",
    *,
    soft_tokens_per_frame: int = SOFT_TOKENS_PER_FRAME,
) -> Document:
    """Frames and their times, then a prompt without loss, then the text to learn.

    Args:
      frames: a list of what `as_image` reads, in order.
      text: what is learned.
      fps: how many of these frames stand for a second.
      timestamps: instead of it, the second of each.
      prompt: before the text.
      soft_tokens_per_frame: budget of each frame.
    Raises:
      InputError: there are no frames, or no times of them.
    """
    shown = as_video(frames, fps, timestamps, soft_tokens_per_frame)
    segments: list[Text | Image] = []
    for number, (image, time) in enumerate(zip(shown.frames, shown.times, strict=True)):
        segments += [Text(f"{' ' * (number > 0)}{time} ", loss=False), image]
    question = as_text(prompt)
    asked = (Text(question, loss=False),) if question else ()
    return Document((*segments, *asked, Text(as_text(text))))


def as_video(value: Any, fps: Any, timestamps: Any, soft_tokens: int) -> Video:
    """The video of a column.

    Args:
      value: a list of what `as_image` reads, pixels [n, height, width, 3], or {"frames": that, "fps": ...}, whose own
        times go before those beside it.
      fps: how many of these frames stand for a second.
      timestamps: instead of it, the second of each.
      soft_tokens: budget of each frame.
    Raises:
      InputError: it is a file, has no frames or too many, or there are no times of them.
    """
    frames = value
    if isinstance(value, Mapping) and "frames" in value:
        frames, fps, timestamps = value["frames"], value.get("fps", fps), value.get("timestamps", timestamps)
    if isinstance(frames, np.ndarray) and frames.ndim == 4:
        frames = list(frames)
    if not isinstance(frames, list) or not frames:
        raise InputError(
            f"a video must be a list of its frames, which are images, and is {frames!r:.100}: films are not decoded, "
            "save their frames first."
        )
    if len(frames) > MAX_FRAMES:
        raise InputError(
            f"a video of {len(frames)} frames is refused: it may have {MAX_FRAMES}, so give fewer a second."
        )
    read = [as_image(frame) for frame in frames]
    images = tuple(Image(image.content, soft_tokens, image.name) for image in read)
    times = (f"{int(t // 60):02d}:{int(t % 60):02d}" for t in _seconds(len(frames), fps, timestamps))
    return Video(images, tuple(times))


def _seconds(number: int, fps: Any, timestamps: Any) -> list[float]:
    if timestamps is not None:
        if not isinstance(timestamps, list) or len(timestamps) != number or not all(map(_is_time, timestamps)):
            raise InputError(f"timestamps must be {number} seconds, one a frame, and are {timestamps!r:.100}.")
        return timestamps
    if not _is_time(fps) or fps == 0:
        raise InputError(f"fps must be the frames of a second, or timestamps be given, and is {fps!r:.100}.")
    return [i / fps for i in range(number)]


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
