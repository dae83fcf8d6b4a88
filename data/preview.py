"""What a run will train on, as one HTML page: packed rows, their images, their attention masks, their padding."""

import dataclasses
import html
import logging
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from gemma4_jax.audio.features import FRAMES_PER_SOFT_TOKEN
from gemma4_jax.batch import Batch
from gemma4_jax.config import Gemma4Config
from gemma4_jax.data.assemble import packing_stats
from gemma4_jax.data.charts import STYLE
from gemma4_jax.data.figures import counted
from gemma4_jax.data.images import image_element, join_patches, picture_source
from gemma4_jax.data.pipeline import make_train_iterator
from gemma4_jax.data.preview_records import sample_html, sound_figure, token_element
from gemma4_jax.data.sample import SourceSample, take_sample
from gemma4_jax.errors import InputError
from gemma4_jax.files import write_atomically
from gemma4_jax.ops.attention.spans import text_spans
from gemma4_jax.run_config import RunConfig
from gemma4_jax.tokenizer import Tokenizer

PREVIEW_ROWS = 8

MAX_ROW_TOKENS = 4096
"""Of a row that is shown; of a longer one the beginning."""

MASK_SIDE = 512
"""Positions drawn of a row's attention mask: all of a short row, evenly spaced ones of a longer."""

_NUM_COLOURS = 6

_STYLE = STYLE + resources.files("gemma4_jax.data").joinpath("bundled/preview.css").read_text("utf-8")


def preview(config: RunConfig, path: str | Path, say: Callable[[str], None] = logging.info) -> None:
    """Writes the page of a run's first records and training rows to `path`; a page that is there already is replaced.

    Args:
      config: of the run, resolved.
      path: of the page.
      say: is told now and then how far it is.

    Raises:
      InputError: if the config, the data or the path are not acceptable.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    samples = take_sample(config, tokenizer, say)
    left_out = [f"Left out a document of {s.name!r}: {reason}" for s in samples for reason in s.left_out]
    with _LeftOut() as seen:
        batches, stop = _first_rows(config, tokenizer, samples)
    about = sample_html(samples, config, tokenizer) + (
        f"<div class='left-out'>{html.escape(stop)}</div>" if stop else ""
    )
    named = list(dict.fromkeys([*left_out, *seen.warnings]))
    page = preview_html(batches, tokenizer, config.model, PREVIEW_ROWS, named, about, f"Preview of {config.name}")
    try:
        write_atomically(Path(path), page)
    except OSError as error:
        raise InputError(f"The page {str(path)!r} cannot be written: {error.strerror}.") from error


def _first_rows(config: RunConfig, tokenizer: Tokenizer, samples: Sequence[SourceSample]) -> tuple[list[Batch], str]:
    """(the first batch of the sources that are no pairs, why training would stop)."""
    of_pairs = {sample.name for sample in samples if sample.num_pairs}
    if of_pairs >= config.data.mixture.keys():
        return [], ""
    sources = {name: source for name, source in config.data.sources.items() if name not in of_pairs}
    # In this process, for what others leave out is told in the terminal alone.
    data = dataclasses.replace(config.data, sources=sources, num_workers=0)
    iterator = make_train_iterator(dataclasses.replace(config, data=data), tokenizer)
    try:
        return [next(iterator)], ""
    except InputError as error:
        return [], f"Training stops: {error}"
    finally:
        iterator.close()


class _LeftOut(logging.Handler):
    """What this room warns of while batches are made: the documents that are left out. A context manager."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: dict[str, None] = {}  # in order, and each once: small sources come round

    def emit(self, record: logging.LogRecord) -> None:
        if Path(record.pathname).parent == Path(__file__).parent:
            self.warnings[record.getMessage()] = None

    def __enter__(self) -> "_LeftOut":
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


def preview_html(
    batches: Iterable[Batch],
    tokenizer: Tokenizer,
    model_config: Gemma4Config,
    max_rows: int,
    left_out: Sequence[str] = (),
    about: str = "",
    title: str = "Preview",
) -> str:
    """One self-contained page that shows packed rows.

    Args:
      batches: on the host; read until `max_rows` rows are shown, and summed up as far as they are read.
      tokenizer: that made them.
      model_config: of the model that will read them: its masks are drawn.
      max_rows: rows to show.
      left_out: one sentence for each document that was left out on the way.
      about: HTML of sections that come before the rows.
      title: of the page.
    Returns:
      HTML.
    """
    sections: list[str] = []
    seen = []
    for batch in batches:
        seen.append(batch)
        shown = range(min(batch.tokens.shape[0], max_rows - len(sections)))
        sections += [_row_section(_row(batch, b), len(sections) + b + 1, tokenizer, model_config) for b in shown]
        if len(sections) == max_rows:
            break
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{_STYLE}</style></head><body>"
        f"<header><h1>{html.escape(title)}</h1>{_LEGEND}{_listed(left_out)}</header>"
        f"{about}{_summary(seen) if seen else ''}{''.join(sections)}</body></html>\n"
    )


def _listed(left_out: Sequence[str]) -> str:
    if not left_out:
        return ""
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in left_out)
    return f"<div class='left-out'><b>{counted(len(left_out), 'document')} left out</b><ul>{items}</ul></div>"


_LEGEND = (
    "<p class='legend'>Each document of a row has its colour. <span class='t s0 loss'>Underlined</span> tokens carry "
    "loss: the model learns to predict them. <span class='t s0 special'>&lt;bos&gt;</span> is a special token. An "
    "image stands where its soft tokens stand, and a sound likewise. Point at a token for its place and id.</p>"
)


def _row(batch: Batch, b: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf)[b] for name, leaf in vars(batch).items()}


def _summary(batches: list[Batch]) -> str:
    stats = [packing_stats(batch) for batch in batches]
    rows, tokens = np.sum([batch.tokens.shape[0] for batch in batches]), batches[0].tokens.shape[1]
    weighted = np.mean([np.mean(np.asarray(batch.loss_weights) > 0) for batch in batches])
    images = sum(s["images"] for s in stats)
    sounds = sum(_num_sounds(batch.frame_sound_ids) for batch in batches)
    figures = {
        "rows": f"{rows:,}",
        "tokens in a row": f"{tokens:,}",
        "documents": f"{sum(s['documents'] for s in stats):,}",
        **({"images": f"{images:,}"} if images else {}),
        **({"sounds": f"{sounds:,}"} if sounds else {}),
        "tokens that carry loss": f"{weighted:.1%}",
        "token padding": f"{np.mean([s['token_padding'] for s in stats]):.1%}",
        **({"patch padding": f"{np.mean([s['patch_padding'] for s in stats]):.1%}"} if images else {}),
    }
    tiles = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in figures.items())
    return f"<h2 class='rows'>The first rows</h2><div class='figures'>{tiles}</div>"


def _num_sounds(frame_sound_ids: np.ndarray | jax.Array) -> int:
    return int(np.asarray(frame_sound_ids).max(axis=-1, initial=0).sum())


def _row_section(row: dict[str, np.ndarray], number: int, tokenizer: Tokenizer, config: Gemma4Config) -> str:
    segments = row["segment_ids"]
    padding = f"{np.mean(segments == 0):.1%} padding"
    documents, images = counted(int(segments.max()), "document"), counted(int(row["image_ids"].max()), "image")
    num_sounds = _num_sounds(row["frame_sound_ids"])
    sounds = f" · {counted(num_sounds, 'sound')}" if num_sounds else ""
    title = f"{documents} · {images}{sounds} · {padding}"
    num_shown = segments[:MAX_ROW_TOKENS].max()
    shown = "".join(_document(row, segment, tokenizer, config) for segment in range(1, num_shown + 1))
    if more := int(np.count_nonzero(segments[MAX_ROW_TOKENS:])):
        shown += f"<p class='legend'>and {counted(more, 'more token')}</p>"
    return (
        f"<section><h2>Row {number} <small>{title}</small></h2>{_bar(segments)}"
        f"<div class='columns'><div class='documents'>{shown}</div>{_masks(row, config)}</div></section>"
    )


def _bar(segments: np.ndarray) -> str:
    """The row drawn to scale: a stretch for each document, and the padding."""
    parts = []
    for segment, run in groupby(segments):
        length = len(list(run))
        label = f"document {segment}" if segment else "padding"
        parts.append(
            f"<i class='{_colour(segment)}' style='flex:{length}' title='{label}: {counted(length, 'token')}'></i>"
        )
    return f"<div class='bar'>{''.join(parts)}</div>"


def _colour(segment: int) -> str:
    return f"s{(segment - 1) % _NUM_COLOURS}" if segment else "pad"


def _document(row: dict[str, np.ndarray], segment: int, tokenizer: Tokenizer, config: Gemma4Config) -> str:
    parts, shown_image, shown_sound = [], 0, 0
    for position in np.flatnonzero(row["segment_ids"][:MAX_ROW_TOKENS] == segment).tolist():
        image, slot = row["image_ids"][position], row["audio_slots"][position]
        if image:
            parts += [_image(row, image, config)] if image != shown_image else []
            shown_image = image
        elif slot >= 0:
            sound = row["frame_sound_ids"][FRAMES_PER_SOFT_TOKEN * slot]
            parts += [_sound(row, sound)] if sound != shown_sound else []
            shown_sound = sound
        else:
            parts.append(_token(row, position, tokenizer))
    return f"<div class='document {_colour(segment)}'>{''.join(parts)}</div>"


def _token(row: dict[str, np.ndarray], position: int, tokenizer: Tokenizer) -> str:
    # The weight stands where the token is predicted: one position earlier.
    carries_loss = position > 0 and row["loss_weights"][position - 1] > 0
    return token_element(tokenizer, int(row["tokens"][position]), row["positions"][position], carries_loss=carries_loss)


def _image(row: dict[str, np.ndarray], image: int, config: Gemma4Config) -> str:
    assert config.vision is not None
    mine = row["patch_image_ids"] == image
    pixels = join_patches(row["patches"][mine], row["patch_positions"][mine], patch_size=config.vision.patch_size)
    height, width = pixels.shape[:2]
    caption = f"{height} x {width} pixels, {counted(int(np.sum(row['image_ids'] == image)), 'soft token')}"
    return f"<figure>{image_element(pixels, f'image {image}')}<figcaption>{caption}</figcaption></figure>"


def _sound(row: dict[str, np.ndarray], sound: int) -> str:
    return sound_figure(row["audio_features"][row["frame_sound_ids"] == sound])


def _masks(row: dict[str, np.ndarray], config: Gemma4Config) -> str:
    text = config.text
    length = len(row["tokens"])
    shown = np.linspace(0, length - 1, min(length, MASK_SIDE)).round().astype(int)
    bidirectional = ", image blocks both ways" if text.image_blocks_bidirectional else ""
    captions = (f"sliding: window {text.sliding_window}{bidirectional}", "global: causal")
    positions, image_ids = (jnp.asarray(row[name][None]) for name in ("positions", "image_ids"))
    spans = text_spans(text, positions, jnp.arange(length)[None], image_ids)
    figures = []
    for caption, kind in zip(captions, spans, strict=True):
        start, stop = (np.asarray(bound)[0, shown, None] for bound in (kind.start, kind.stop))
        mask = (shown >= start) & (shown < stop) & (row["segment_ids"][shown] > 0)[:, None]
        # Palette: 0 hidden, 1 and 2 the visible keys of text and of images, 3 the visible keys that lie ahead.
        colours = mask * (1 + (row["image_ids"][shown] > 0)[None, :]).astype(np.uint8)
        colours[np.triu(mask, 1)] = 3
        picture = PIL.Image.fromarray(colours, "P")
        picture.putpalette([128, 128, 128, 92, 124, 250, 64, 192, 160, 240, 140, 40])
        source = picture_source(picture, transparency=0)
        figures.append(f"<figure><img class='mask' src='{source}' alt=''><figcaption>{caption}</figcaption></figure>")
    key = "Queries down, keys across. <b class='k1'>text</b> <b class='k2'>soft tokens</b> <b class='k3'>ahead</b>"
    return f"<aside>{''.join(figures)}<p>{key}</p></aside>"
