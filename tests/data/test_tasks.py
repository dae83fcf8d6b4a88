"""What each task makes of a record, and what it refuses."""

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.tasks import TASKS
from gemma4_jax.errors import InputError

PIXELS = np.zeros((4, 6, 3), np.uint8)


def test_segments_are_spelt_out():
    spelt = [{"image": b"file", "max_soft_tokens": 70}, {"text": "what? ", "loss": False}, {"text": "a cat"}]
    document = TASKS["segments"](segments=spelt)
    assert document == Document((Image(b"file", 70), Text("what? ", loss=False), Text("a cat")))
    assert TASKS["segments"](text="alone") == Document((Text("alone"),))
    assert TASKS["segments"](segments=[{"image": "a/cat.png"}]).segments == (Image("a/cat.png", name="a/cat.png"),)
    assert TASKS["segments"](segments=[{"image": PIXELS}]).segments[0].content is PIXELS


def test_text_is_a_string_utf8_or_a_number():
    numbers = [(3, "3"), (np.int64(7), "7"), (0.5, "0.5"), (10**400, str(10**400))]
    for given, expected in [("a", "a"), ("ä".encode(), "ä"), *numbers]:
        assert TASKS["text"](text=given) == Document((Text(expected),))
    for given in (None, True, ["a"], {"a": 1}, float("nan"), np.float32("inf")):
        with pytest.raises(InputError, match=r"text cannot be .*: give a string, UTF-8 or a number"):
            TASKS["text"](text=given)


def test_a_caption_follows_its_image_and_its_prompt():
    assert TASKS["caption"](image=b"file", text="a cat") == Document((Image(b"file"), Text("a cat")))
    asked = TASKS["caption"](image="cat.png", text=3, prompt="how many? ")
    assert asked == Document((Image("cat.png", name="cat.png"), Text("how many? ", loss=False), Text("3")))
    for given in (PIXELS, PIL.Image.fromarray(PIXELS)):
        assert TASKS["caption"](image=given, text="a").segments[0].content is given
    for given in (None, 3, {"path": None}):
        with pytest.raises(InputError, match=r"an image cannot be .*: give pixels, the bytes of a file, or its path"):
            TASKS["caption"](image=given, text="a")
