"""Sound files: what their samples are, how long ones are cut, and what is refused."""

import io
import time

import numpy as np
import pytest

from gemma4_jax.audio.features import MAX_SAMPLES, SAMPLE_RATE, log_mel, num_frames, num_soft_tokens
from gemma4_jax.data.document import Conversation, Document, Image, Sound, Text
from gemma4_jax.data.sound_pieces import cut_sounds
from gemma4_jax.data.sounds import MAX_SECONDS, num_samples, read_samples
from gemma4_jax.errors import InputError

soundfile = pytest.importorskip("soundfile")


def encoded(samples, *, rate=SAMPLE_RATE, form="WAV", **options) -> bytes:
    """[n] or [n, channels] floats, or integers of 16 bits, as a file."""
    data = io.BytesIO()
    soundfile.write(data, samples, rate, format=form, **options)
    return data.getvalue()


def chirp(seconds, rate):
    """A tone that rises from 100 to 6,300 Hz, at any rate."""
    t = np.arange(round(seconds * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * (100 * t + 6200 / seconds * t**2 / 2))


STEREO = np.array([[0, 0], [32767, -32768], [-32768, -32768], [100, 201]], np.int16)


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_samples_are_those_of_the_file(form):
    mono = read_samples(encoded(STEREO[:, 0], form=form))
    np.testing.assert_array_equal(mono, np.float32([0, 32767 / 32768, -1, 100 / 32768]))
    mean = read_samples(encoded(STEREO, form=form))
    np.testing.assert_array_equal(mean, np.float32([0, -0.5 / 32768, -1, 150.5 / 32768]))
    assert mean.dtype == np.float32


FORMS = [
    *(("WAV", rate, 1e-4) for rate in (8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 96000, 192000)),
    ("FLAC", 44100, 1e-4),
    ("OGG", 48000, 0.02),
    ("MP3", 44100, 0.02),
    ("MP3", 16000, 0.05),
]


@pytest.mark.parametrize(("form", "rate", "tolerance"), FORMS)
def test_a_sound_is_the_same_in_every_form(form, rate, tolerance):
    """The same tone, sampled at each rate: of lossy formats as near as these keep it."""
    sound = encoded(np.stack([chirp(2, rate)] * 2, axis=1), rate=rate, form=form)
    samples = read_samples(sound)
    assert num_samples(sound) == len(samples) == 2 * SAMPLE_RATE
    assert num_soft_tokens(num_frames(len(samples))) == 50
    inside = slice(800, 15_000)  # up to what 8,000 samples a second hold
    error = np.sqrt(np.mean((samples - chirp(2, SAMPLE_RATE))[inside] ** 2))
    assert error < tolerance


def test_what_is_too_high_to_be_heard_does_not_come_back_lower():
    t = np.arange(96_000) / 48_000
    for hertz, level in [(3000, 0), (7000, 0), (8200, -60), (12_000, -60), (20_000, -60)]:
        samples = read_samples(encoded(0.9 * np.sin(2 * np.pi * hertz * t), rate=48_000, subtype="FLOAT"))
        decibels = 20 * np.log10(np.sqrt(2 * np.mean(samples[2000:-2000] ** 2)) / 0.9 + 1e-9)
        assert decibels < level if level else abs(decibels) < 0.01, (hertz, decibels)


def test_features_are_the_reference_s():
    transformers = pytest.importorskip("transformers")
    extract = transformers.Gemma4AudioFeatureExtractor()
    for rate, form in [(16_000, "FLAC"), (44_100, "WAV")]:
        samples = read_samples(encoded(chirp(3, rate), rate=rate, form=form))
        theirs = extract([samples], sampling_rate=SAMPLE_RATE, return_tensors="np")
        mask = theirs["input_features_mask"][0]
        np.testing.assert_array_equal(log_mel(samples, 128), theirs["input_features"][0][mask])


# Long ones.


@pytest.mark.parametrize(
    ("seconds", "pieces"),
    [
        (30, [None]),
        (30.001, [(0, 16), (16, 31)]),
        (61, [(0, 21), (21, 42), (42, 61)]),
        (90, [(0, 30), (30, 60), (60, 90)]),
    ],
)
def test_a_long_sound_is_cut_into_few_pieces_of_whole_seconds(seconds, pieces):
    content = encoded(np.zeros(round(8000 * seconds), np.int16), rate=8000, form="FLAC")
    cut = cut_sounds(Document((Text("a"), Sound(content, "long.flac"), Text("b"))))
    assert cut.segments == (Text("a"), *(Sound(content, "long.flac", piece) for piece in pieces), Text("b"))
    lengths = [num_samples(segment.content, segment.seconds) for segment in cut.segments if isinstance(segment, Sound)]
    assert sum(lengths) == round(SAMPLE_RATE * seconds)
    assert max(lengths) <= MAX_SAMPLES


@pytest.mark.parametrize(("form", "rate"), [("WAV", 16_000), ("FLAC", 44_100), ("MP3", 22_050), ("OGG", 48_000)])
def test_pieces_are_the_whole(form, rate):
    """With no seam where they meet, though each is decoded and resampled alone."""
    noise = np.random.default_rng(0).normal(size=29 * rate) * 0.1
    whole = read_samples(encoded(noise, rate=rate, form=form))
    content = encoded(noise, rate=rate, form=form)
    pieces = [read_samples(content, stretch) for stretch in ((0, 10), (10, 20), (20, 29))]
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=0, atol=1e-6 if form in ("WAV", "FLAC") else 1e-4)


def test_samples_are_cut_too():
    samples = np.arange(40 * SAMPLE_RATE, dtype=np.float32)
    pieces = cut_sounds(Document((Sound(samples),))).segments
    assert len(pieces) == 2
    np.testing.assert_array_equal(
        np.concatenate([read_samples(piece.content, piece.seconds) for piece in pieces]), samples
    )


def test_each_piece_has_a_place_in_a_talk():
    long, short = (Sound(np.zeros(n * SAMPLE_RATE, np.float32)) for n in (61, 2))
    said = [{"type": "audio"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "audio"}]
    messages = ({"role": "user", "content": said}, {"role": "assistant", "content": "Yes."})
    cut = cut_sounds(Document((long, Image(b""), short), conversation=Conversation(messages)))
    assert [type(segment) for segment in cut.segments] == [Sound] * 3 + [Image, Sound]
    assert cut.conversation.messages[0]["content"] == [said[0]] * 2 + said
    assert cut.conversation.messages[1] == messages[1]


# Bad ones.

SILENCE = np.zeros(100, np.int16)
RIFF = encoded(STEREO)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(SILENCE, rate=44_101), "44101 samples a second in 1 channels .* resample it to 16000"),
        (encoded(SILENCE, rate=384_000), "384000 samples a second"),
        (encoded(np.zeros((4, 9))), "9 channels"),
        (encoded(np.zeros(MAX_SAMPLES + 1, np.int16)), "30.0 s is too long: at most 30 s are heard at once"),
        (encoded(SILENCE[:0]), "without a sample"),
        (encoded(np.zeros(601 * 8000, np.int16), rate=8000, form="FLAC"), f"601 s is refused: at most {MAX_SECONDS}"),
        (RIFF[:30], "cannot be decoded"),
        (encoded(SILENCE, form="AIFF"), "cannot be decoded .it is of another format"),
        (encoded(SILENCE, form="FLAC")[:60], "cannot be decoded"),
        (b"OggS", "cannot be decoded .* whole file of WAV, FLAC, MP3, OGG"),
        (b"", r"cannot be decoded \(it is of another format"),
        (b"#!/bin/sh", r"cannot be decoded \(it is of another format"),
    ],
)
def test_bad_files(data, reason):
    with pytest.raises(InputError, match=reason):
        read_samples(data)


def test_a_file_that_ends_too_early_is_refused():
    for form in ("FLAC", "WAV"):
        whole = encoded(np.random.default_rng(0).normal(size=80_000) * 0.1, form=form)
        try:
            samples = read_samples(whole[: len(whole) // 2])
        except InputError:
            continue
        assert form == "WAV"  # its reader goes by the size of the file
        assert len(samples) < 41_000


def test_a_header_that_lies_costs_nothing():
    """Ten years of sound, it says."""
    flac = bytearray(encoded(SILENCE, form="FLAC"))
    flac[21] |= 0x0F  # number of samples, 36 bits
    flac[22:26] = b"\xff" * 4
    began = time.perf_counter()
    with pytest.raises(InputError, match=r"s is refused: at most 600 s are read|cannot be decoded"):
        read_samples(bytes(flac))
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("form", ["WAV", "FLAC", "MP3", "OGG"])
def test_hostile_bytes_are_never_another_error(form):
    rng = np.random.default_rng(0)
    good = np.frombuffer(encoded(rng.normal(size=4000) * 0.1, form=form), np.uint8)
    for _ in range(100):
        damaged = good.copy()
        damaged[rng.integers(0, len(good), 5)] = rng.integers(0, 256, 5)
        damaged[rng.integers(0, 60, 2)] = rng.integers(0, 256, 2)
        try:
            for segment in cut_sounds(Document((Sound(damaged.tobytes()),))).segments:
                sound = segment.content, segment.seconds
                assert len(read_samples(*sound)) == num_samples(*sound)
        except InputError:
            continue


def test_without_the_library_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(InputError, match=r"need soundfile, which cannot be imported .* install it"):
        read_samples(RIFF)
