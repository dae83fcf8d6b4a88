"""Conversations in every form that people have them become messages, with images and sounds in their places."""

import base64
import io
import json

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.document import Image, Sound
from gemma4_jax.data.tasks import TASKS, chat
from gemma4_jax.data.tasks.places import MAX_PARTS
from gemma4_jax.errors import InputError

PIXELS = np.zeros((4, 6, 3), np.uint8)
Q, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
IMAGE = {"type": "image"}


def text(said):
    return {"type": "text", "text": said}


def png():
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


def messages_of(**record):
    return list(chat(**record).conversation.messages)


FORMS = {
    "messages": {"messages": [Q, A]},
    "roles of Gemma": {"messages": [Q, {"role": "model", "content": "Hello"}]},
    "conversations": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "conversations of roles": {"conversations": [Q, A]},
    "instruction": {"instruction": "Hi", "input": "", "output": "Hello"},
    "prompt and completion": {"prompt": "Hi", "completion": "Hello"},
    "prompt and completion of messages": {"prompt": [Q], "completion": [A]},
    "texts": {"texts": [{"user": "Hi", "assistant": "Hello", "source": "vqa"}], "images": []},
    "with what Arrow adds": {"messages": [Q | {"tool_calls": None, "name": None}, A], "images": None, "tools": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_messages(form):
    assert messages_of(**FORMS[form], id=3) == [Q, A]
    with_system = messages_of(**FORMS[form], system="Be brief.")
    assert with_system == [{"role": "system", "content": "Be brief."}, Q, A]


def test_an_instruction_has_input_and_history():
    record = {"instruction": "Add.", "input": "1 + 1", "output": "2", "history": [["Hi", "Hello"]]}
    said = [message["content"] for message in messages_of(**record)]
    assert said == ["Hi", "Hello", "Add.\n\n1 + 1", "2"]


def test_what_is_learned():
    two = [Q, A, Q, A]
    assert chat(messages=two).conversation.num_learned is None
    assert chat(messages=two, last_turn_only=True).conversation.num_learned == 1
    assert chat(prompt=two, completion=[A, Q, A]).conversation.num_learned == 2


def uri(data=b"file"):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"type": "image", "image": b"file"}, Image(b"file")),
        ({"type": "image", "image": {"bytes": b"file", "path": "a.png"}}, Image(b"file", name="a.png")),
        ({"type": "image", "image": {"bytes": None, "path": "a.png"}}, Image("a.png", name="a.png")),
        ({"type": "image", "path": "a.png", "text": None}, Image("a.png", name="a.png")),
        ({"type": "image", "image": "a.png", "metadata": {"width": 6}}, Image("a.png", name="a.png")),
        ({"type": "image_url", "image_url": {"url": uri(), "detail": "low"}}, Image(b"file")),
        ({"type": "image_url", "image_url": uri()}, Image(b"file")),
        ({"type": "image", "base64": base64.b64encode(b"file").decode()}, Image(b"file")),
        ({"type": "audio", "audio": "a.wav"}, Sound("a.wav", "a.wav")),
        (
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"}},
            Sound(b"RIFF"),
        ),
    ],
)
def test_a_part_holds_its_image_or_sound(part, image):
    document = chat(messages=[{"role": "user", "content": [part, text("What?")]}, A])
    assert document.segments == (image,)
    kind = "image" if isinstance(image, Image) else "audio"
    assert document.conversation.messages[0]["content"] == [{"type": kind}, text("What?")]


BESIDE = {
    "LLaVA": (
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "<image>?"}],
        },
        [IMAGE, text("\nHi")],
    ),
    "LLaVA of several": (
        {"image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "one <image> two <image>"}, A]},
        [text("one "), IMAGE, text(" two "), IMAGE],
    ),
    "parts that are filled": (
        {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": [IMAGE, text("and"), IMAGE]}, A]},
        [IMAGE, text("and"), IMAGE],
    ),
    "nothing says where": ({"images": ["a.png", "b.png"], "messages": [Q, A]}, [IMAGE, IMAGE, text("Hi")]),
    "nothing says where, in parts": (
        {"images": ["a.png"], "messages": [{"role": "user", "content": [text("Hi")]}, A]},
        [IMAGE, text("Hi")],
    ),
    "texts": ({"images": ["a.png"], "texts": [{"user": "Hi", "assistant": "Hello"}]}, [IMAGE, text("Hi")]),
}


@pytest.mark.parametrize("form", BESIDE)
def test_images_beside_the_messages_find_their_places(form):
    record, content = BESIDE[form]
    document = chat(**record)
    assert [image.content for image in document.segments] == ["a.png", "b.png"][: len(document.segments)]
    assert document.conversation.messages[0]["content"] == content
    assert isinstance(document.conversation.messages[1]["content"], str)  # what the model says is left alone


def test_a_literal_mark_is_text_where_no_column_has_images():
    said = {"role": "user", "content": "What is <image> in SVG, and <audio>?"}
    document = chat(messages=[said, A])
    assert document.segments == ()
    assert document.conversation.messages[0] == said


def test_calls_of_tools_are_read_as_json():
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": '{"room": "x", "floor": null}'}}
    answer = {"role": "tool", "name": "f", "tool_call_id": "c1", "content": "21"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "enum": None}}}]
    talk = [Q, {"role": "assistant", "content": None, "tool_calls": [call]}, answer, A]
    for given in (tools, json.dumps(tools)):
        conversation = chat(messages=talk, tools=given).conversation
        assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"room": "x"}
        assert conversation.messages[2] == answer
        assert conversation.tools == (
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
        )
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"room": "x"}}'},
        {"from": "observation", "value": "21"},
        {"from": "gpt", "value": "Hello"},
    ]
    spoken = messages_of(conversations=turns)
    assert [message["role"] for message in spoken] == ["user", "assistant", "tool", "assistant"]
    assert spoken[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"room": "x"}}


def said(content):
    return {"messages": [{"role": "user", "content": content}, A]}


REFUSED = {
    r"it has no conversation in its columns id, text: a chat has messages, or": {"id": 1, "text": "a"},
    r"several conversations \(messages, conversations\)": {"messages": [Q, A], "conversations": [Q, A]},
    r"0 messages is refused": {"messages": []},
    r"a list of 4097": {"messages": [Q] * 4097},
    r"message 1: its role is 'robot', and must be one of system": {"messages": [Q, {"role": "robot", "content": ""}]},
    r"message 0: its role is None": {"messages": [{"content": "a"}]},
    r"message 0: it must be a dictionary": {"messages": ["a"]},
    r"message 1: it has no content": {"messages": [Q, {"role": "assistant", "content": None}]},
    r"message 0: its content must be a text or a list of parts": said(3),
    r"message 0: a part is .*'film'": said([{"type": "film"}]),
    r"message 0: a part is .*\['text'\]": said([{"type": ["text"]}]),
    r"message 0: 4097 parts are refused": said([text("a")] * (MAX_PARTS + 1)),
    r"2 places for images, and 1 images are beside": {"image": "a.png", **said("<image> <image>")},
    r"1 places for images, and 0 images are beside": said([IMAGE]),
    r"1 places for images, and 2 images are": {"images": ["a", "b"], **said([IMAGE])},
    r"1 places for images, and 0 images": {"conversations": [{"from": "human", "value": "<image>"}, A]},
    r"an image cannot be 3": {"images": [3], **said("a")},
    r"base64 cannot be read": said([{"type": "image_url", "image_url": {"url": "data:image/png;base64,$$"}}]),
    r"give one in base64": said([{"type": "image_url", "image_url": {"url": "data:image/svg+xml,<svg/>"}}]),
    r"tools must be a list": {"messages": [Q, A], "tools": "3"},
    r"is not JSON": {"messages": [Q, A], "tools": "["},
    r"tool_calls must be a list": {"messages": [Q, {"role": "assistant", "tool_calls": [3]}]},
    r"a weight of its own": {"messages": [Q, A | {"weight": 0}]},
    r"history must be a list": {"instruction": "a", "output": "b", "history": [["a"]]},
    r"texts must be a list": {"texts": ["a"]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_record_that_is_no_chat_is_refused(message):
    with pytest.raises(InputError, match=message):
        TASKS["chat"](**REFUSED[message])


def test_nesting_has_an_end():
    deep = "a"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InputError, match="nested too deeply"):
        chat(messages=deep)


def test_many_marks_are_counted_before_they_are_made():
    with pytest.raises(InputError, match="places for images"):
        chat(image="a.png", **said("<image>" * 100_000))
