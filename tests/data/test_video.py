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
from gemma4_jax.data.tasks import TASKS
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import SourceConfig


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


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"frames": []}, "frames must be a list of images"),
        ({"frames": "film.mp4", "fps": 1}, "frames must be a list of images"),
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
