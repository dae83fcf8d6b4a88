"""Frames of a video and their times: the tokens are those of the reference's processor."""

import io
import json
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.data.document import Document, Image, Text
from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.encode import Encoder
from gemma4_jax.data.pairs import encode_pair
from gemma4_jax.data.tasks import TASKS
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import SourceConfig
from tests import conversations


def test_each_frame_follows_its_time():
    document = TASKS["video"](frames=["a.png", b"b"], text="A cat.", fps=0.5, prompt="What? ")
    assert document == Document((
        Text("00:00 ", loss=False), Image("a.png", 70, "a.png"),
        Text(" 00:02 ", loss=False), Image(b"b", 70),
        Text("What? ", loss=False), Text("A cat."),
    ))  # fmt: skip
    assert TASKS["auto"](frames=["a.png", b"b"], text="A cat.", fps=0.5, prompt="What? ", id=3) == document
    timed = TASKS["video"](frames=[b"a", b"b"], text="a", timestamps=[59.9, 3661], soft_tokens_per_frame=140)
    assert [timed.segments[i].text for i in (0, 2)] == ["00:59 ", " 61:01 "]
    assert timed.segments[1].max_soft_tokens == 140


@pytest.mark.parametrize(("fps", "count", "size"), [(1, 3, (60, 90)), (24, 30, (40, 40)), (0.013, 5, (90, 20))])
def test_tokens_are_the_reference_s(fps, count, size, tmp_path, tokenizer, model):
    """But for the name of the placeholder: that of an image, as here the model reads a frame as one."""
    pytest.importorskip("transformers")
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
    from transformers.video_utils import VideoMetadata

    names = []
    for i in range(count):
        PIL.Image.fromarray(np.full((*size, 3), 8 * i, np.uint8)).save(tmp_path / f"{i}.png")
        names.append(f"{i}.png")
    record = {"frames": names, "fps": fps, "text": "A cat jumps.", "prompt": "What?\n"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    documents = open_documents(SourceConfig("mine", path=str(tmp_path / "a.jsonl")))
    example = Encoder(tokenizer, model.vision, 70)(documents[0]).read()

    vision = model.vision
    height, width = get_aspect_ratio_preserving_size(
        *size, vision.patch_size, 70 * vision.pooling_size**2, vision.pooling_size
    )
    soft_tokens = height * width // (vision.patch_size * vision.pooling_size) ** 2
    assert [image.num_soft_tokens for image in example.images] == [soft_tokens] * count
    metadata = VideoMetadata(total_num_frames=count, fps=fps, frames_indices=list(range(count)))
    given = {"num_soft_tokens_per_video": [soft_tokens], "video_metadata": [metadata]}
    names = SimpleNamespace(boi_token="<|image>", video_token="<|video|>", eoi_token="<image|>")
    written = f"<bos>{Gemma4Processor.replace_video_token(names, given, 0)}What?\nA cat jumps.<eos>"
    expected = np.array(tokenizer.encode_with_ends(written, reads_special_tokens=True)[0])
    roles = tokenizer.tokens
    assert example.tokens.tolist() == np.where(expected == roles.video, roles.image, expected).tolist()
    assert tokenizer.decode(example.tokens[example.carries_loss].tolist()) == "A cat jumps.<eos>"


FRAMES = ["0.png", "1.png", "2.png"]
ASKED = {"type": "text", "text": "Watch "}
ANSWERED = {"role": "assistant", "content": "It jumps."}


def asking(*parts):
    return {"messages": [{"role": "user", "content": [ASKED, *parts]}, ANSWERED]}


FORMS = {
    "in its part": asking({"type": "video", "video": FRAMES, "fps": 0.5}),
    "with times": asking({"type": "video", "video": FRAMES, "timestamps": [0, 2, 4.0]}),
    "whole in its part": asking({"type": "video", "video": {"frames": FRAMES, "fps": 0.5}, "fps": None}),
    "in a column": {**asking({"type": "video"}), "videos": [FRAMES], "fps": [0.5]},
    "alone in a column": {**asking({"type": "video"}), "video": FRAMES, "timestamps": [0, 2, 4]},
    "with its rate in a column": {**asking({"type": "video"}), "videos": [{"frames": FRAMES, "fps": 0.5}]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Watch <video>"}, {"from": "gpt", "value": "It jumps."}],
        "videos": [FRAMES],
        "timestamps": [[0, 2, 4]],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_video_of_a_chat_is_what_the_reference_makes_of_it(form, tmp_path, model):
    """Its template writes one placeholder, which its processor makes times and frames of."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
    from transformers.video_utils import VideoMetadata

    for name, colour in zip(FRAMES, (0, 90, 180), strict=True):
        PIL.Image.fromarray(np.full((60, 90, 3), colour, np.uint8)).save(tmp_path / name)
    tokenizer = conversations.write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(conversations.GEMMA4)
    (tmp_path / "a.jsonl").write_text(json.dumps(FORMS[form]))
    document = open_documents(SourceConfig("mine", path=str(tmp_path / "a.jsonl")))[0]
    example = Encoder(tokenizer, model.vision, 70)(document).read()
    soft_tokens = {image.num_soft_tokens for image in example.images}
    assert len(example.images) == 3
    assert len(soft_tokens) == 1

    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path), bos_token="<bos>")
    talk = asking({"type": "video"})["messages"]
    written = theirs.apply_chat_template(talk, chat_template=conversations.GEMMA4, tokenize=False)
    metadata = VideoMetadata(total_num_frames=3, fps=0.5, frames_indices=[0, 1, 2])
    given = {"num_soft_tokens_per_video": [soft_tokens.pop()], "video_metadata": [metadata]}
    names = SimpleNamespace(boi_token="<|image>", video_token="<|video|>", eoi_token="<image|>")
    written = written.replace("<|video|>", Gemma4Processor.replace_video_token(names, given, 0))
    expected = np.array(theirs(written, add_special_tokens=False)["input_ids"])
    roles = tokenizer.tokens
    assert (expected == roles.video).any()
    assert example.tokens.tolist() == np.where(expected == roles.video, roles.image, expected).tolist()
    assert tokenizer.decode(example.tokens[example.carries_loss].tolist()) == "It jumps.<turn|>"


def test_images_and_videos_of_a_chat_stand_in_their_order():
    parts = {"type": "image"}, {"type": "video"}, {"type": "image"}, {"type": "video"}
    record = {**asking(*parts), "images": [b"a", b"b"], "videos": [[b"1", b"2"], [b"3"]], "fps": [1, 2]}
    document = TASKS["chat"](**record, soft_tokens_per_frame=140)
    assert [image.content for image in document.segments] == [b"a", b"1", b"2", b"b", b"3"]
    assert [image.max_soft_tokens for image in document.segments] == [None, 140, 140, None, 140]
    assert document.conversation.videos == (("00:00", "00:01"), ("00:00",))
    assert [part["type"] for part in document.conversation.messages[0]["content"][1:]] == [p["type"] for p in parts]
    assert TASKS["auto"](**record, soft_tokens_per_frame=140) == document


def test_a_pair_of_answers_to_a_video(tmp_path, model):
    tokenizer = conversations.write_tokenizer(tmp_path / "tokenizer")
    asked = asking({"type": "video", "video": [np.zeros((20, 20, 3), np.uint8)] * 2, "fps": 1})["messages"][:1]
    worse = {"role": "assistant", "content": "It sleeps."}
    pair = TASKS["preference"](prompt=asked, chosen=[ANSWERED], rejected=[worse])
    for side, said in zip(encode_pair(pair, Encoder(tokenizer, model.vision, 70)), ("jumps", "sleeps"), strict=True):
        assert "Watch 00:00 " in tokenizer.decode(side.text.tokens.tolist())
        assert len(side.images) == 2
        assert tokenizer.decode(side.text.tokens[side.text.carries_loss].tolist()) == f"It {said}.<turn|>\n"


def test_a_name_that_a_user_says_is_no_place(tmp_path, model):
    tokenizer = conversations.write_tokenizer(tmp_path / "tokenizer")
    said = TASKS["chat"](messages=[{"role": "user", "content": "What is <|video|>?"}, ANSWERED])
    tokens = Encoder(tokenizer, model.vision, 70)(said).text.tokens
    assert tokenizer.tokens.video not in tokens


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (asking({"type": "video", "video": "film.mp4"}), "is 'film.mp4': films are not decoded, save their frames"),
        (asking({"type": "video", "path": "film.mp4", "fps": 1}), "films are not decoded"),
        (asking({"type": "video_url", "video_url": {"url": "https://a.org/b.mp4"}}), "films are not decoded"),
        ({**asking({"type": "video"}), "videos": ["film.mp4"], "fps": 1}, "is 'film.mp4': films are not decoded"),
        ({**asking({"type": "video"}), "videos": [[b"a"]]}, "fps must be the frames"),
        ({**asking({"type": "video"}), "videos": [[b"a"]], "fps": [1, 2]}, "fps are given for 2 videos, .* are 1"),
        ({**asking({"type": "video"}), "videos": [[b"a"], [b"b"]], "fps": 1}, "1 places for videos, and 2 videos"),
        (asking({"type": "video"}), "1 places for videos, and 0 videos"),
        (asking({"type": "video", "video": [b"a"] * 257, "fps": 1}), "a video of 257 frames is refused"),
    ],
)
def test_videos_that_a_chat_cannot_have(record, message):
    with pytest.raises(InputError, match=message):
        TASKS["chat"](**record)


def test_a_template_that_knows_no_videos_is_told(tmp_path, model):
    tokenizer = conversations.write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(conversations.GENERATION.replace("part['text']", "''"))
    document = TASKS["chat"](**asking({"type": "video", "video": [b"a"], "fps": 1}))
    with pytest.raises(InputError, match="the chat template writes 0 places for videos, and 1 are given"):
        Encoder(tokenizer, model.vision, 70)(document)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"frames": []}, "a video must be a list of its frames"),
        ({"frames": "film.mp4", "fps": 1}, "a video must be a list of its frames.*films are not decoded"),
        ({"frames": [b"a"] * 257, "fps": 1}, "a video of 257 frames is refused: it may have 256"),
        ({"frames": [b"a"]}, "fps must be the frames .* and is None"),
        ({"frames": [b"a"], "fps": 0}, "fps must be"),
        ({"frames": [b"a"], "fps": float("nan")}, "fps must be"),
        ({"frames": [b"a"], "timestamps": [1, 2]}, "timestamps must be 1 seconds"),
        ({"frames": [b"a"], "timestamps": ["1"]}, "timestamps must be 1 seconds"),
        ({"frames": [3], "fps": 1}, "an image cannot be 3"),
    ],
)
def test_bad_videos(record, message):
    with pytest.raises(InputError, match=message):
        TASKS["video"](**record, text="a")


def test_frames_in_rows(tmp_path):
    """As a Parquet file has them."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    PIL.Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(file, "PNG")
    rows = [{"frames": [{"bytes": file.getvalue(), "path": None}] * 3, "fps": 2.0, "text": "a cat"}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    document = open_documents(SourceConfig("mine", kind="parquet", path=str(tmp_path / "a.parquet")))[0]
    assert [s.text for s in document.segments if isinstance(s, Text)] == ["00:00 ", " 00:00 ", " 00:01 ", "a cat"]
