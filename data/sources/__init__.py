"""Where documents come from: one file per format, and the table of their kinds.

A source is written KIND, or KIND:ARGUMENT, or KIND:ARGUMENT?OPTION=VALUE&OPTION=VALUE:

    digits                                                       handwritten numbers, shipped in this package
    python                                                       the sources of Python's standard library
    jsonl:data/train.jsonl                                       your own documents
    tfds:mnist/train?image=image&prompt=digit: &text=label       a data set of TensorFlow Datasets
"""

from collections.abc import Callable
from urllib.parse import parse_qsl

from gemma4_jax.data.document import Source
from gemma4_jax.data.sources.digits import DigitsSource
from gemma4_jax.data.sources.jsonl import JsonlSource
from gemma4_jax.data.sources.python_source import PythonSource
from gemma4_jax.data.sources.tfds import TfdsSource
from gemma4_jax.errors import InputError

BUNDLED: dict[str, Callable[[str, int], Source]] = {
    "digits": DigitsSource,
    "python": lambda split, seed: PythonSource(split),
}
"""Kinds that need no argument, opened by split, "train" or "held_out", and seed; training sees nothing held out."""

FORMATS: dict[str, type[JsonlSource] | type[TfdsSource]] = {"jsonl": JsonlSource, "tfds": TfdsSource}
"""Kinds that read your data, opened by argument and options."""


def open_source(spec: str, *, split: str = "train", seed: int = 0) -> Source:
    """Opens the source that `spec` describes.

    Args:
      spec: as this module's page says.
      split: "train", or "held_out" for a kind in `BUNDLED`.
      seed: of kinds whose documents are made up as they are read.
    Raises:
      InputError: if there is no such kind, option or data, or it has no documents.
    """
    kind, _, rest = spec.partition(":")
    if kind in BUNDLED:
        if rest:
            raise InputError(f"The source {spec!r} takes no argument: write {kind!r}.")
        return BUNDLED[kind](split, seed)
    if kind not in FORMATS:
        raise InputError(f"The source {spec!r} is of no known kind: the kinds are {', '.join([*BUNDLED, *FORMATS])}.")
    if split != "train":
        raise InputError(f"The source {spec!r} keeps no documents back: only {' and '.join(BUNDLED)} do.")
    argument, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    accepted = FORMATS[kind].OPTIONS
    if not argument or not options.keys() <= set(accepted):
        form = f"{kind}:NAME" + (f"?OPTION=VALUE with the options {', '.join(accepted)}" if accepted else "")
        raise InputError(f"The source {spec!r} is not complete or has an unknown option: write it as {form}.")
    source = FORMATS[kind](argument, **options)
    if len(source) == 0:
        raise InputError(f"The source {spec!r} has no documents: give it some, or leave it out of data.mixture.")
    return source
