"""Records of a sample as HTML: what the model reads of each, what it learns, and what the sources are like."""

import base64
import dataclasses
import html
import io
import wave
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import PIL.Image

from gemma4_jax.audio.features import SAMPLE_RATE
from gemma4_jax.data.charts import histogram, line_chart
from gemma4_jax.data.document import Sound
from gemma4_jax.data.example import SizedImage
from gemma4_jax.data.figures import counted
from gemma4_jax.data.images import image_element, join_patches, png_source
from gemma4_jax.data.pack import RowShape
from gemma4_jax.data.sample import Shown, SourceSample, mixed_sizes, pack_sizes, suggest_patches
from gemma4_jax.data.sounds import read_samples
from gemma4_jax.errors import InputError
from gemma4_jax.run_config import RunConfig
from gemma4_jax.tokenizer import Tokenizer

MAX_TOKENS = 2000
"""Of a record that is shown; of a longer one the beginning."""


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
    head = (
        "source",
        "records",
        "read",
        "left out",
        "documents",
        "tokens in one",
        "carry loss",
        "images",
        "soft tokens in one",
    )
    lines = []
    for sample in samples:
        learned, tokens = sum(sample.learned), sum(sample.tokens)
        cells = (
            html.escape(sample.name), f"{sample.num_records:,}", f"{sample.num_read:,}", f"{len(sample.left_out):,}",
            f"{len(sample.tokens):,}", _spread(sample.tokens), f"{learned / tokens:.1%}" if tokens else "",
            f"{len(sample.soft_tokens):,}", _spread(sample.soft_tokens),
        )  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{''.join(lines)}</table>"


def _spread(values: Sequence[int]) -> str:
    """The median, and between which values all are."""
    if not values:
        return ""
    return f"{np.median(values):,.0f} <small>({min(values):,} to {max(values):,})</small>"


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
            found.append(f"{counted(sample.num_pairs, 'record')} of {name} are pairs, which no objective reads yet.")
        if sample.num_read and not sample.tokens:
            found.append(f"No record of {name} can be used.")
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found)
    return f"<div class='left-out'><ul>{items}</ul></div>" if items else ""


def _plots(samples: Sequence[SourceSample], config: RunConfig) -> str:
    data = config.data
    tokens = [number for sample in samples for number in sample.tokens]
    soft_tokens = [number for sample in samples for number in sample.soft_tokens]
    plots = [
        histogram("Tokens of a document", tokens, unit="documents", marks={"a row": data.seq_len}),
        histogram("Soft tokens of an image", soft_tokens, unit="images"),
    ]
    sizes, shape = mixed_sizes(samples, data), RowShape.from_config(data, config.model)
    sentences = []
    if sizes:
        fill = pack_sizes(sizes, shape.space())
        shares = {"tokens": fill[:, 0], **({"patches": fill[:, 1]} if shape.patches else {})}
        series = {name: list(enumerate(share.tolist())) for name, share in shares.items()}
        plots.append(line_chart("Rows, full to", series, includes=(0, 1)) if len(fill) > 1 else "")
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
    patches = f" and {fill[:, 1].mean():.1%} of patches" if shape.patches else ""
    return f"{fill[:, 0].mean():.1%} of tokens{patches}"


def _source(sample: SourceSample, tokenizer: Tokenizer) -> str:
    shown = "".join(_record(record, number, tokenizer) for number, record in enumerate(sample.shown))
    title = f"{counted(sample.num_read, 'record')} read, {len(sample.left_out):,} left out"
    return f"<section><h2>{html.escape(sample.name)} <small>{title}</small></h2>{shown}</section>" if shown else ""


def _record(shown: Shown, number: int, tokenizer: Tokenizer) -> str:
    """One document, token by token, with its images and sounds where their soft tokens stand."""
    text, roles = shown.example.text, tokenizer.tokens
    images = iter(shown.example.images)
    heard = (segment for segment in shown.document.segments if isinstance(segment, Sound))
    sounds = zip_longest(heard, text.sounds)  # of what was encoded before, only features are left
    parts, i = [], 0
    tokens = text.tokens.tolist()
    while i < min(len(tokens), MAX_TOKENS):
        if tokens[i] == roles.image:
            image = next(images)
            parts.append(image_figure(image))
            i += image.num_soft_tokens
        elif tokens[i] == roles.audio:
            parts.append(_sound_figure(*next(sounds)))
            i = next((j for j in range(i, len(tokens)) if tokens[j] != roles.audio), len(tokens))
        else:
            parts.append(token_element(tokenizer, tokens[i], i, carries_loss=bool(text.carries_loss[i])))
            i += 1
    more = f"<em>and {len(tokens) - i:,} more tokens</em>" if i < len(tokens) else ""
    note = f"<p class='note'>left out: {html.escape(shown.note)}</p>" if shown.note else ""
    title = f"{html.escape(shown.title)}: {counted(len(tokens), 'token')}, {int(text.carries_loss[1:].sum()):,} learned"
    return f"<h3>{title}</h3>{note}<div class='document s{number % 6}'>{''.join(parts)}{more}</div>"


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


def _sound_figure(sound: Sound | None, features: np.ndarray) -> str:
    """A player, and the features that the tower hears: time to the right, high tones above."""
    player = "" if sound is None else _player(sound)
    if not features.size:
        return f"<figure><figcaption>too short for a frame</figcaption>{player}</figure>"
    low, high = features.min(), features.max()
    levels = ((features - low) / max(high - low, 1e-6) * 255).astype(np.uint8).T[::-1]
    picture = png_source(PIL.Image.fromarray(np.ascontiguousarray(levels)))
    return f"<figure><img class='spectrogram' src='{picture}' alt='spectrogram'>{player}</figure>"


def _player(sound: Sound) -> str:
    samples = read_samples(sound)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    source = f"data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}"
    caption = f"{len(samples) / SAMPLE_RATE:.1f} s{html.escape(f', {sound.name}' if sound.name else '')}"
    return f"<audio controls src='{source}'></audio><figcaption>{caption}</figcaption>"
