"""How far this implementation is from the reference, beside how far the reference is from itself: docs/parity.md.

  python -m benchmarks.parity            # from the repository root; needs the `reference` extra
  python -m benchmarks.parity e2b 31b    # these alone, printed and not written

The page explains what is compared. The same comparison decides tests/hf/test_parity.py.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

from gemma4_jax.config import Gemma4Config
from gemma4_jax.hf.names import tensors
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS
from tests.hf import recording, reference, samples

PAGE = Path(__file__).parents[1] / "docs" / "parity.md"
QUANTITIES = ("hidden states", "logits", "loss", "gradients")
# Name -> (ours, the reference's, what both are compared with).
DTYPES = {
    "float32": (jnp.float32, torch.float32, torch.float64),
    "bfloat16": (jnp.bfloat16, torch.bfloat16, torch.float32),
}

TEXT = """# Equal to the reference

Written by `python -m benchmarks.parity` with transformers {transformers}, torch {torch} and jax {jax} on a CPU. Each
model is an official size with smaller widths and depths and every feature of it; those called `_audio` hear. The
weights and documents are those of tests/hf/samples.py; a case may be several documents, of which the reference pads
some and ours are rows of one batch.

An error is the largest difference in a tensor over its largest entry, and the largest over layers, documents and
parameters where there are several. Each cell is our error and, behind the stroke, the reference's own: in float32 both
against the reference in float64, in bfloat16 both against the reference in float32, on weights that bfloat16 holds
exactly. Loss and gradients are not computed for the cases of one budget of soft tokens.

| model | case | dtype | {quantities} |
| --- | --- | --- | {columns} |
"""

Result = dict[str, list[np.ndarray]]
"""Quantity -> its arrays, in the same order whoever computed them."""


def cases(name: str, config: Gemma4Config) -> Iterator[tuple[str, list[samples.Segments], bool]]:
    """(name, documents, whether to differentiate) of every case."""
    for case, documents in samples.cases(config).items():
        yield case, documents, True
    if name in samples.OFFICIAL_SIZES:
        for budget in SOFT_TOKEN_BUDGETS:
            yield f"budget of {budget}", [samples.image_of_budget(config, budget)], False


def ours(name: str, config: Gemma4Config, weights: dict[str, np.ndarray], dtype: jnp.dtype) -> dict[str, Result]:
    """What this implementation computes, by case. Cases to differentiate are rows of one batch, compiled once."""
    model = samples.model(config, weights, dtype=dtype)
    differentiate = samples.gradient_function(model)
    together = samples.all_documents(config)
    batch = samples.batch([[document] for document in together], config)
    common, start, results = _forward(model, together, config), 0, {}
    for case, documents, is_differentiated in cases(name, config):
        if not is_differentiated:
            results[case] = _join(_forward(model, documents, config))
            continue
        stop = start + len(documents)
        is_row = (np.arange(len(together)) >= start) & (np.arange(len(together)) < stop)
        weighted = dataclasses.replace(batch, loss_weights=batch.loss_weights * is_row[:, None])
        loss, gradients = differentiate(weighted)
        results[case] = _join(common[start:stop]) | _training(loss, _by_name(gradients, config))
        start = stop
    return results


def theirs(name: str, config: Gemma4Config, weights: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, Result]:
    """What the reference computes, by case."""
    model, results = reference.build(config, weights, dtype), {}
    with reference.in_float64() if dtype == torch.float64 else nullcontext():
        for case, documents, is_differentiated in cases(name, config):
            results[case] = _join(
                {
                    "hidden states": [layer for _, stack in sorted(layers.items()) for layer in stack],
                    "logits": reference.logits(model, [document], config),
                }
                for document in documents
                for layers in [reference.layers(model, [document], config)]
            )
            if is_differentiated:
                results[case] |= _training(*reference.loss_and_gradients(model, documents, config))
    return results


def _forward(model: samples.Gemma4, documents: list[samples.Segments], config: Gemma4Config) -> list[Result]:
    """Hidden states and logits of each document, all of them rows of one batch."""
    rows = samples.batch([[document] for document in documents], config)
    logits, stacks = recording.logits_and_layers(model, rows)
    results = []
    for row, document in enumerate(documents):
        ordered = [
            recording.in_reference_order(name, layer, rows, row)
            for name, stack in sorted(stacks.items())
            for layer in stack
        ]
        length = len(samples.example(document, config).tokens)
        results.append({"hidden states": [layer for layer in ordered if layer.size], "logits": [logits[row, :length]]})
    return results


def _join(results: list[Result] | Iterator[Result]) -> Result:
    joined: Result = {}
    for result in results:
        for quantity, arrays in result.items():
            joined.setdefault(quantity, []).extend(arrays)
    return joined


def _training(loss: float, gradients: dict[str, np.ndarray]) -> Result:
    return {"loss": [np.asarray(loss)], "gradients": [gradients[name] for name in sorted(gradients)]}


def _by_name(gradients: dict[str, np.ndarray], config: Gemma4Config) -> dict[str, np.ndarray]:
    """Our gradients as those of the reference's parameters."""
    return {
        tensor.name: tensor.to_theirs(
            gradients[tensor.path] if tensor.index is None else gradients[tensor.path][tensor.index]
        )
        for tensor in tensors(config)
        if tensor.path in gradients
    }


def largest_error(given: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Largest difference over largest entry, the largest of all arrays; where all is zero, so must be what is given."""
    worst = 0.0
    for ours, true in zip(given, expected, strict=True):
        difference, size = np.abs(ours.astype(np.float64) - true).max(), np.abs(true).max()
        worst = max(worst, float(difference / size) if size else float(difference > 0))
    return worst


def lines(name: str) -> Iterator[str]:
    """The rows of the table about one model."""
    config = samples.variant(name)
    for dtype, (our_dtype, their_dtype, true_dtype) in DTYPES.items():
        weights = samples.lively_weights(config)
        if dtype == "bfloat16":
            weights = {name: array.astype(ml_dtypes.bfloat16).astype(np.float32) for name, array in weights.items()}
        true = theirs(name, config, weights, true_dtype)
        mine, noise = ours(name, config, weights, our_dtype), theirs(name, config, weights, their_dtype)
        for case, expected in true.items():
            cells = [
                f"{largest_error(mine[case][quantity], expected[quantity]):.1e} / "
                f"{largest_error(noise[case][quantity], expected[quantity]):.1e}"
                if quantity in expected
                else ""
                for quantity in QUANTITIES
            ]
            yield f"| {name} | {case.replace('_', ' ')} | {dtype} | {' | '.join(cells)} |\n"


def main() -> None:
    """Compares, prints, and writes the page if all models were compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*samples.VARIANTS, []], help="those to compare; all by default")
    models = parser.parse_args().models
    versions = {name: version(name) for name in ("transformers", "torch", "jax")}
    page = TEXT.format(quantities=" | ".join(QUANTITIES), columns=" | ".join(["---:"] * len(QUANTITIES)), **versions)
    for name in models or samples.VARIANTS:
        for line in lines(name):
            print(line, end="", flush=True)
            page += line
    if not models:
        PAGE.write_text(page)
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
