"""A video as its frames, each after the time at which it stands, and what is said of it.

    {"frames": [IMAGE, IMAGE, ...], "fps": 2, "text": "A cat jumps."}

Films are not decoded: save their frames first. Source: Gemma4Processor of transformers 5.23, `replace_video_token`.
"""

import math
from typing import Any

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.tasks.media import as_image
from gemma4_jax.data.tasks.text import as_text
from gemma4_jax.errors import InputError


def video(
    frames: Any,
    text: Any,
    fps: Any = None,
    timestamps: Any = None,
    prompt: str = "",
    *,
    soft_tokens_per_frame: int = 70,
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
    if not isinstance(frames, list) or not frames:
        raise InputError(f"frames must be a list of images, and are {frames!r:.100}.")
    segments: list[Text | Image] = []
    for number, (frame, seconds) in enumerate(zip(frames, _seconds(len(frames), fps, timestamps), strict=True)):
        image = as_image(frame)
        segments.append(Text(f"{' ' * (number > 0)}{int(seconds // 60):02d}:{int(seconds % 60):02d} ", loss=False))
        segments.append(Image(image.content, soft_tokens_per_frame, image.name))
    question = as_text(prompt)
    asked = (Text(question, loss=False),) if question else ()
    return Document((*segments, *asked, Text(as_text(text))))


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
