"""What a preview says of the first records: what is read and learned of them, and what rows they make."""

import base64
import dataclasses
import io
import json
import re
import wave
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.config import AudioConfig
from gemma4_jax.data import preview_records, sample
from gemma4_jax.data.example import SizedSound
from gemma4_jax.data.pack import RowShape
from gemma4_jax.data.preview import preview
from gemma4_jax.data.sample import mixed_sizes, pack_sizes, suggest_patches, take_sample

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)


def chat(asked, answered):
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


@pytest.fixture
def page_of(make_config, tmp_path):
    """A function from records, and changes of `data`, to the page of them."""

    def page(*records, audio=None, **changes):
        (tmp_path / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        config = make_config(sources={"mine": {"path": f"{tmp_path}/mine.jsonl"}}, batch_size=1, **changes)
        if audio:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, audio=audio))
        preview(config, tmp_path / "page.html")
        return (tmp_path / "page.html").read_text("utf-8").split("<h2>The first records</h2>")[1]

    return page


def learned(html):
    return "".join(re.findall(r"<span class='t loss[^']*' title='[^']*'>(.*?)</span>", html))


def record_of(page):
    """The first record that is shown."""
    return re.search(r"<h3>.*?</div>", page, re.DOTALL)[0]


def test_a_chat_is_shown_with_its_images_and_what_is_learned(page_of, tmp_path):
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.png")
    record = record_of(page_of({"image": "a.png", **chat("Look: <image> What?", "A cat.")}))
    assert re.sub(r"<figure>.*?</figure>", "[image]", record).count("[image]") == 1
    text = re.sub(r"<[^>]+>", "", re.sub(r"<figure>.*?</figure>", "[image]", record))
    assert "Look: &lt;|image&gt;[image]&lt;image|&gt; What?" in text
    assert learned(record) == "A cat.&lt;turn|&gt;"


def spoken(num_samples):
    """A part of a message."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 16000, 0, "NONE", ""))
        writer.writeframes((np.sin(np.arange(num_samples) / 5) * 9999).astype("<i2").tobytes())
    sound = {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}
    return {"type": "input_audio", "input_audio": sound}


def test_a_sound_is_shown_with_a_player_and_its_spectrogram(page_of):
    asked = [{"type": "text", "text": "Listen: "}, spoken(8000)]
    page = page_of(chat(asked, "A tone."), chat("Hi", "Hello"), audio=AudioConfig(), frames_per_row=400)
    (source,) = re.findall(r"<audio controls src='data:audio/wav;base64,([^']*)'>", page)
    with wave.open(io.BytesIO(base64.b64decode(source))) as heard:
        assert heard.getparams()[:4] == (1, 2, 16000, 8000)
    pictures = re.findall(r'<image href="data:image/jpeg;base64,([^"]*)"', page)
    assert len(pictures) >= 2  # of the record, and of the row that it is packed in
    assert PIL.Image.open(io.BytesIO(base64.b64decode(pictures[0]))).height == AudioConfig().num_mel_bins
    assert {"0 s", "0 kHz", "8 kHz"} <= set(re.findall(r"<text[^>]*>([^<]*)<", page))
    assert learned(record_of(page)) == "A tone.&lt;turn|&gt;"
    assert page.count("&lt;|audio|&gt;") == 0  # placeholders
    assert re.search(r"<small>\d+ documents · 0 images · \d+ sounds", page)


def test_both_sides_of_a_pair_are_shown(page_of):
    page = page_of({"prompt": "a b", "chosen": " good", "rejected": " bad"})
    assert [learned(part) for part in page.split("<h3>")[1:]] == [" good&lt;eos&gt;", " bad&lt;eos&gt;"]
    assert "line 1, chosen" in page
    assert "&#x27;mine&#x27; has 1 pair of answers, which no objective reads yet" in page


def test_records_left_out_are_shown_with_the_reason(page_of):
    page = page_of(chat("Hi", "Hello"), chat("Hi", "x" * 2000))
    assert re.search(r"<p class='note'>left out: .*line 2: \d+ tokens, .* do not fit in a row", page)


def test_a_warning_where_nothing_carries_loss(page_of):
    page = page_of({"segments": [{"text": "a", "loss": False}]})
    assert "Nothing in the documents of &#x27;mine&#x27; carries loss" in page
    assert "Training stops: " in page  # and why


def test_a_longer_record_is_cut_where_it_is_shown(page_of):
    page = page_of({"text": "a b c d e " * 2000})
    assert re.search(r"and [\d,]+ more tokens", page)


def test_no_more_is_read_than_a_sample(make_config, tokenizer, monkeypatch):
    monkeypatch.setattr(sample, "SAMPLE_RECORDS", 10)
    assert [found.num_read for found in take_sample(make_config(), tokenizer, print)] == [5, 5]
    monkeypatch.setattr(sample, "SAMPLE_SECONDS", 0)
    said = []
    assert [found.num_read for found in take_sample(make_config(), tokenizer, said.append)] == [1, 1]
    assert "1 of 5 records" in said[0]


def test_rows_are_filled_as_the_packer_does_and_patches_suggested():
    rng = np.random.default_rng(0)
    texts = [(int(n), 0, 0, 0) for n in rng.integers(20, 300, 400)]
    images = [(int(n) + 70, 1, 280, 0) for n in rng.integers(20, 100, 400)]
    sizes = [size for pair in zip(texts, images, strict=True) for size in pair]
    wide = RowShape(1024, 20, 20 * 280, 48)
    wanted = suggest_patches(sizes, wide, largest_image=280, cell=4)
    assert wanted % 4 == 0
    narrow = dataclasses.replace(wide, patches=wanted)
    before, after = (pack_sizes(sizes, shape.space()).mean(axis=0) for shape in (wide, narrow))
    assert after[0] > 0.99 * before[0] > 0.95
    assert after[1] > 0.7 > 0.3 > before[1]
    assert suggest_patches(texts, wide, largest_image=280, cell=4) == 0
    assert suggest_patches(sizes, dataclasses.replace(wide, images=1), largest_image=280, cell=4) == 280


def test_a_sample_is_mixed_in_the_proportions_of_its_sources(make_config, tokenizer):
    config = make_config()
    found = [
        sample.SourceSample("digits", 9, sizes=[[(1, 0, 0, 0)]]),
        sample.SourceSample("python", 9, sizes=[[(2, 0, 0, 0)]]),
    ]
    drawn = mixed_sizes(found, config.data)
    assert len(drawn) == 1000
    assert sum(size[0] == 1 for size in drawn) == 700


def test_a_sound_too_short_for_a_frame_is_said_to_be(page_of):
    page = page_of(chat([spoken(80), spoken(8000)], "A tone."), audio=AudioConfig(), frames_per_row=400)
    short, long = re.findall(r"<figure.*?</figure>", record_of(page))
    assert "too short for a frame" in short
    assert "<audio" in short
    assert "spectrogram" in long


def test_a_sound_that_cannot_be_decoded_is_shown_with_the_reason():
    sound = SizedSound(b"RIFF", num_frames=9, mel_bins=128, name="x.wav")
    assert "x.wav: A sound file cannot be decoded" in preview_records._sound(sound, has_player=True)


def test_of_a_long_recording_a_minute_has_players(page_of, tmp_path):
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 16000, 0, "NONE", ""))
        writer.writeframes(bytes(2 * 16000 * 70))
    (tmp_path / "long.wav").write_bytes(file.getvalue())
    page = record_of(
        page_of({"audio": "long.wav", "text": "a"}, audio=AudioConfig(), seq_len=2048, frames_per_row=8000)
    )
    assert page.count("<figure class='sound'>") == 3  # of 24 s at most
    assert page.count("<audio controls") == 2


def test_images_that_are_missing_are_counted(page_of, tmp_path):
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.png")
    page = page_of({"texts": ["a", None, None, "b"], "images": [None, "a.png", None, "gone.png"]})
    assert "learned, 2 images missing</h3>" in page
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", page)
    assert cells[cells.index("images missing") + len(cells) // 2] == "2"


def test_plots_name_their_axes_and_sources_keep_their_colours(make_config, tokenizer):
    config = make_config()
    found = [
        sample.SourceSample("digits", 9, tokens=[50, 60], soft_tokens=[40]),
        sample.SourceSample("a & b", 9, tokens=[70], soft_tokens=[9]),
    ]
    plots = preview_records._plots(found, config)
    charts = [ElementTree.fromstring(chart) for chart in re.findall(r"<svg.*?</svg>", plots)]
    names = [[text.text for text in chart.iter("text") if text.get("class") == "name"] for chart in charts]
    assert names == [["tokens", "documents"], ["soft tokens", "images"]]
    labels = [[text.text for text in chart.iter("text") if text.get("class") == "label"] for chart in charts]
    assert labels == [["digits", "a & b"]] * 2
    marks = [[text.text for text in chart.iter("text") if text.get("class") == "mark"] for chart in charts]
    assert marks == [[], ["budget"]]  # a row is too far beyond
