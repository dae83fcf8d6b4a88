"""Records of a sample as HTML: what the model reads of each, what it learns, and what the sources are like."""

import base64
import dataclasses
import html
import io
import wave
from collections.abc import Sequence

import numpy as np
import PIL.Image

from gemma4_jax.audio.features import MAX_HERTZ, SAMPLE_RATE
from gemma4_jax.data.charts import histogram, line_chart, spectrogram
from gemma4_jax.data.example import SizedImage, SizedSound, StoredArray
from gemma4_jax.data.figures import counted
from gemma4_jax.data.images import image_element, join_patches, picture_source
from gemma4_jax.data.pack import RowShape
from gemma4_jax.data.sample import (
    FRAMES_PER_SECOND,
    Shown,
    SourceSample,
    mixed_sizes,
    pack_sizes,
    suggest_patches,
)
from gemma4_jax.data.sounds import read_samples
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import RunConfig
from gemma4_jax.tokenizer import Tokenizer

MAX_TOKENS = 2000
"""Of a record that is shown; of a longer one the beginning."""

MAX_PLAYED_SECONDS = 60
"""Of a record, with a player: a second is 43 KB of the page."""

_TONES = (0.0, 1000.0, 2000.0, 4000.0, 8000.0)
"""Hertz that are named beside a spectrogram."""


def sample_html(samples: Sequence[SourceSample], config: RunConfig, tokenizer: Tokenizer) -> str:
    """The sections of a page about the first records of its sources: figures, warnings, plots, and records.

    Args:
      samples: from `take_sample`.
      config: of the run, resolved.
      tokenizer: of it.
    """
    about = _table(samples), _warnings(samples), _plots(samples, config)
    records = (_source(sample, tokenizer) for sample in samples)
    return f"<section><h2>The first records</h2>{''.join(about)}</section>{''.join(records)}"


def _table(samples: Sequence[SourceSample]) -> str:
    columns: dict[str, Sequence[str]] = {
        "source": [html.escape(sample.name) for sample in samples],
        "records": [f"{sample.num_records:,}" for sample in samples],
        "read": [f"{sample.num_read:,}" for sample in samples],
        "left out": [f"{len(sample.left_out):,}" for sample in samples],
        "documents": [f"{len(sample.tokens):,}" for sample in samples],
        "tokens in one": [_spread(sample.tokens) for sample in samples],
        "carry loss": [f"{sum(s.learned) / sum(s.tokens):.1%}" if s.tokens else "" for s in samples],
    }
    if any(sample.soft_tokens or sample.images_missing for sample in samples):
        columns["images"] = [f"{len(sample.soft_tokens):,}" for sample in samples]
        columns["soft tokens in one"] = [_spread(sample.soft_tokens) for sample in samples]
        columns["images missing"] = [f"{sample.images_missing:,}" for sample in samples]
    if any(sample.sounds for sample in samples):
        columns["sounds"] = [f"{len(sample.sounds):,}" for sample in samples]
        columns["seconds in one"] = [_spread(sample.sounds, ".1f") for sample in samples]
    lines = zip(*columns.values(), strict=True)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    head = "".join(f"<th>{name}</th>" for name in columns)
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def _spread(values: Sequence[float], digits: str = ",.0f") -> str:
    """The median, and between which values all are."""
    if not values:
        return ""
    middle, least, most = (format(value, digits) for value in (np.median(values), min(values), max(values)))
    return f"{middle} <small>({least} to {most})</small>"


def _warnings(samples: Sequence[SourceSample]) -> str:
    found = []
    for sample in samples:
        name = repr(sample.name)
        if sample.tokens and not any(sample.learned):
            found.append(
                f"Nothing in the documents of {name} carries loss: nothing is learned of it. Of a chat the turns of "
                "the assistant are learned, of segments those that do not say loss: false."
            )
        elif unlearned := sum(number == 0 for number in sample.learned):
            found.append(f"In {counted(unlearned, 'document')} of {name} nothing carries loss.")
        if sample.num_pairs:
            found.append(f"{name} has {counted(sample.num_pairs, 'pair')} of answers, which no objective reads yet.")
        if sample.num_read and not sample.tokens:
            found.append(f"No record of {name} can be used.")
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found)
    return f"<div class='left-out'><ul>{items}</ul></div>" if items else ""


def _plots(samples: Sequence[SourceSample], config: RunConfig) -> str:
    data = config.data
    tokens, soft_tokens, sounds = (
        {sample.name: getattr(sample, field) for sample in samples} for field in ("tokens", "soft_tokens", "sounds")
    )
    budget = {"budget": data.soft_tokens_per_image}
    plots = [
        histogram("Length of a document", tokens, x="tokens", y="documents", marks={"a row": data.seq_len}),
        histogram("Size of an image", soft_tokens, x="soft tokens", y="images", marks=budget),
        histogram("Length of a sound", sounds, x="seconds", y="sounds"),
    ]
    sizes, shape = mixed_sizes(samples, data), RowShape.from_config(data, config.model)
    sentences = []
    if sizes:
        fill = pack_sizes(sizes, shape.space())
        shares = {"tokens": fill[:, 0], **({"patches": fill[:, 1]} if fill[:, 1].any() else {})}
        series = {name: list(enumerate((100 * np.sort(share)).tolist(), 1)) for name, share in shares.items()}
        order = "rows, the emptiest first"
        chart = line_chart("How full rows are", series, x=order, y="% of the places", includes=(0, 100))
        plots.append(chart if len(fill) > 1 else "")
        sentences.append(f"Rows of {_mixture(samples)} are full to {_full(fill, shape)}.")
    if shape.patches and config.model.vision is not None:
        cell = config.model.vision.pooling_size**2
        wanted = suggest_patches(sizes, shape, data.soft_tokens_per_image * cell, cell)
        if wanted and abs(wanted - shape.patches) > 0.05 * shape.patches:
            other = dataclasses.replace(shape, patches=wanted)
            full = _full(pack_sizes(sizes, other.space()), other)
            sentences.append(f"With data.patches_per_row={wanted}, in place of {shape.patches}, to {full}.")
    said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)
    return f"<div class='plots'>{''.join(plots)}</div>{said}"


def _mixture(samples: Sequence[SourceSample]) -> str:
    return "these documents" if len(samples) == 1 else "these documents, in the proportions of their sources,"


def _full(fill: np.ndarray, shape: RowShape) -> str:
    patches = f" and {fill[:, 1].mean():.1%} of patches" if shape.patches and fill[:, 1].any() else ""
    return f"{fill[:, 0].mean():.1%} of tokens{patches}"


def _source(sample: SourceSample, tokenizer: Tokenizer) -> str:
    shown = "".join(_record(record, number, tokenizer) for number, record in enumerate(sample.shown))
    title = f"{counted(sample.num_read, 'record')} read, {len(sample.left_out):,} left out"
    return f"<section><h2>{html.escape(sample.name)} <small>{title}</small></h2>{shown}</section>" if shown else ""


def _record(shown: Shown, number: int, tokenizer: Tokenizer) -> str:
    """One document, token by token, with its images and sounds where their soft tokens stand."""
    text, roles = shown.example.text, tokenizer.tokens
    images, sounds = iter(shown.example.images), iter(shown.example.sounds)
    parts, i, left = [], 0, float(MAX_PLAYED_SECONDS)
    tokens = text.tokens.tolist()
    while i < min(len(tokens), MAX_TOKENS):
        if tokens[i] == roles.image:
            image = next(images)
            parts.append(image_figure(image))
            i += image.num_soft_tokens
        else:
            parts.append(token_element(tokenizer, tokens[i], i, carries_loss=bool(text.carries_loss[i])))
            i += 1
            if tokens[i - 1] == roles.begin_audio:  # the mark, as a sound may be too short for a soft token
                sound = next(sounds)
                left -= sound.num_frames / FRAMES_PER_SECOND
                parts.append(_sound(sound, has_player=left >= 0))
                i += sound.num_soft_tokens
    more = f"<em>and {len(tokens) - i:,} more tokens</em>" if i < len(tokens) else ""
    note = f"<p class='note'>left out: {html.escape(shown.note)}</p>" if shown.note else ""
    title = f"{html.escape(shown.title)}: {counted(len(tokens), 'token')}, {int(text.carries_loss[1:].sum()):,} learned"
    missing = f", {counted(text.images_missing, 'image')} missing" if text.images_missing else ""
    return f"<h3>{title}{missing}</h3>{note}<div class='document s{number % 6}'>{''.join(parts)}{more}</div>"


def token_element(tokenizer: Tokenizer, token_id: int, position: int, *, carries_loss: bool) -> str:
    """A token, as its vocabulary writes it."""
    classes = ["t"]
    if carries_loss:
        classes.append("loss")
    token = tokenizer.token(token_id)
    if token in tokenizer.special_tokens:
        classes.append("special")
    text = html.escape(token.replace("▁", " ")).replace("\n", "<em>↵</em>\n").replace("\t", "<em>→</em>\t")
    return f"<span class='{' '.join(classes)}' title='position {position}, id {token_id}'>{text}</span>"


def image_figure(image: SizedImage) -> str:
    """An image as the tower reads it; of one that cannot be decoded the reason."""
    try:
        read = image.read()
    except InputError as error:
        return f"<figure><figcaption>{html.escape(str(error))}</figcaption></figure>"
    pixels = join_patches(read.patches, read.positions, patch_size=image.patch_size)
    caption = f"{pixels.shape[0]} x {pixels.shape[1]} pixels, {counted(image.num_soft_tokens, 'soft token')}"
    return f"<figure>{image_element(pixels, image.name or 'image')}<figcaption>{caption}</figcaption></figure>"


def _sound(sound: SizedSound, *, has_player: bool) -> str:
    """A sound as the tower hears it, with a player unless only its features are left; or why it cannot be decoded."""
    try:
        features = sound.read()
        player = ""
        if has_player and not isinstance(sound.content, StoredArray):
            player = _player(read_samples(sound.content, sound.seconds))
    except InputError as error:
        return f"<figure><figcaption>{html.escape(str(error))}</figcaption></figure>"
    return sound_figure(features, sound.name, player)


def sound_figure(features: np.ndarray, name: str = "", player: str = "") -> str:
    """The features that the tower hears, time to the right and high tones above.

    Args:
      features: [F, M] log-mel features.
      name: of their file; empty if it has none.
      player: an element to listen to them; empty if there is none.
    """
    seconds = len(features) / FRAMES_PER_SECOND
    name = f", {html.escape(name)}" if name else ""
    caption = f"<figcaption>{seconds:.1f} s{name}</figcaption>"
    if not features.size:
        return f"<figure>{player}<figcaption>too short for a frame{name}</figcaption></figure>"
    low, high = features.min(), features.max()
    levels = ((features - low) / max(high - low, 1e-6) * 255).astype(np.uint8).T[::-1]
    picture = PIL.Image.fromarray(np.ascontiguousarray(levels))
    picture = picture.resize((min(picture.width, 800), picture.height), PIL.Image.Resampling.BOX)
    source = picture_source(picture, "JPEG", quality=80)
    tones = {f"{hertz / 1000:g} kHz": _mel(hertz) / _mel(MAX_HERTZ) for hertz in _TONES}
    return f"<figure class='sound'>{spectrogram(source, seconds, tones)}{player}{caption}</figure>"


def _mel(hertz: float) -> float:
    """The scale on which the bands of the features are equally wide."""
    return float(np.log1p(hertz / 700))


def _player(samples: np.ndarray) -> str:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return f"<audio controls src='data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}'></audio>"
