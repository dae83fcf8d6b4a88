"""How far this implementation is from the reference, beside how far the reference is from itself: docs/parity.md.

  python -m benchmarks.parity            # from the repository root, a quarter of an hour; needs the `reference` extra
  python -m benchmarks.parity e2b 31b    # these models alone again

The page explains what is compared; parity.json beside this file holds the figures. tests/hf/test_parity.py decides by
the same comparison.
"""

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

from gemma4_jax.batch import Batch
from gemma4_jax.config import Gemma4Config
from gemma4_jax.hf.names import tensors
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS
from tests.hf import recording, reference, samples

PAGE = Path(__file__).parents[1] / "docs" / "parity.md"
FIGURES = Path(__file__).with_suffix(".json")
QUANTITIES = ("hidden states", "logits", "loss", "gradients")
# Name -> (ours, the reference's, what both are compared with).
DTYPES = {
    "float32": (jnp.float32, torch.float32, torch.float64),
    "bfloat16": (jnp.bfloat16, torch.bfloat16, torch.float32),
}

TEXT = """# Equal to the reference

Written by `python -m benchmarks.parity` with transformers {transformers}, torch {torch} and jax {jax} on a CPU. Each
model is an official size with smaller widths and depths and every feature of it; those called `_audio` hear. The
weights and documents are those of tests/hf/samples.py. The reference pads the documents of a case to one length; ours
are rows of one batch. In the case `packed` two rows hold all the documents, and the reference reads each alone.

In float32 both are compared with the reference in float64, in bfloat16 both with the reference in float32, on weights
that bfloat16 holds exactly. So the reference's own error is what the dtype costs, and ours should be no larger. The
largest error is the largest difference in an array over its largest entry, and the largest of all layers or parameters
where there are several. The typical error is the root mean square of the differences over that of the array, and again
over all arrays. Loss and gradients are not computed for the cases of one budget of soft tokens.

## Typical errors of all cases

{summary}

The root mean square of the cases. A loss is one number, which may be exact by chance, so the cases have no ratios.
Single cases scatter around the ratio, most of all those of the experts in bfloat16: where rounding flips a token's
choice between two experts, the gradients of that router are as wrong as they are large, and it is luck in whose run it
flips.

## Largest errors of each case, ours / the reference's own

{table}
"""

Result = Mapping[str, Mapping[str, np.ndarray]]
"""Quantity -> name of an array -> the array, whoever computed it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Documents by what they try.

    Attributes:
      name: of the case.
      rows: the documents of each row of our batch.
      is_packed: a row holds several documents, and the reference reads each alone; else they are a padded batch for it.
      is_differentiated: whether loss and gradients are compared too.
    """

    name: str
    rows: Sequence[Sequence[samples.Segments]]
    is_packed: bool = False
    is_differentiated: bool = True

    @property
    def documents(self) -> list[samples.Segments]:
        """Of all rows, in order."""
        return [document for row in self.rows for document in row]


def cases(name: str, config: Gemma4Config) -> list[list[Case]]:
    """All cases; those of one list are rows of one batch, so that they are compiled together."""
    plain = [Case(case, [[document] for document in documents]) for case, documents in samples.cases(config).items()]
    everything = samples.all_documents(config)
    packed = Case("packed", [everything[::2], everything[1::2]], is_packed=True)
    budgets = SOFT_TOKEN_BUDGETS if name in samples.OFFICIAL_SIZES else ()
    images = [
        Case(f"budget_of_{budget}", [[samples.image_of_budget(config, budget)]], is_differentiated=False)
        for budget in budgets
    ]
    return [group for group in ([*plain, packed], images[:-1], images[-1:]) if group]


def ours(
    groups: list[list[Case]], config: Gemma4Config, weights: dict[str, np.ndarray], dtype: jnp.dtype
) -> dict[str, Result]:
    """What this implementation computes, by case."""
    model, results = samples.model(config, weights, dtype=dtype), {}
    differentiate = samples.gradient_function(model)
    for group in groups:
        batch = samples.batch([row for case in group for row in case.rows], config)
        logits, stacks = recording.logits_and_layers(model, batch)
        start = 0
        for case in group:
            stop = start + len(case.rows)
            places = [(row, i) for row in range(start, stop) for i in range(1, len(case.rows[row - start]) + 1)]
            result = results[case.name] = {
                "hidden states": _hidden_states(stacks, batch, places),
                "logits": {"": np.concatenate([logits[row, batch.segment_ids[row] == i] for row, i in places])},
            }
            if case.is_differentiated:
                loss_weights = np.zeros_like(batch.loss_weights)
                loss_weights[start:stop] = batch.loss_weights[start:stop]
                loss, gradients = differentiate(dataclasses.replace(batch, loss_weights=loss_weights))
                result |= {"loss": {"": np.array(loss)}, "gradients": _by_name(gradients, config)}
            start = stop
    return results


def _hidden_states(
    stacks: dict[str, list[np.ndarray]], batch: Batch, places: list[tuple[int, int]]
) -> dict[str, np.ndarray]:
    """What every layer puts out for some documents of a batch, but for layers that have nothing to do with them."""
    found = {}
    for stack, layers in stacks.items():
        for i, layer in enumerate(layers):
            parts = [recording.in_reference_order(stack, layer, batch, row, document) for row, document in places]
            if sum(map(len, parts)):
                found[f"{stack} {i}"] = np.concatenate(parts)
    return found


def _by_name(gradients: dict[str, np.ndarray], config: Gemma4Config) -> dict[str, np.ndarray]:
    """Our gradients as those of the reference's parameters."""
    return {
        tensor.name: tensor.to_theirs(
            gradients[tensor.path] if tensor.index is None else gradients[tensor.path][tensor.index]
        )
        for tensor in tensors(config)
        if tensor.path in gradients
    }


def theirs(
    groups: list[list[Case]], config: Gemma4Config, weights: dict[str, np.ndarray], dtype: torch.dtype
) -> dict[str, Result]:
    """What the reference computes, by case."""
    model, results = reference.build(config, weights, dtype), {}
    nothing = {name: np.zeros(parameter.shape, np.float32) for name, parameter in model.named_parameters()}
    with reference.in_float64() if dtype == torch.float64 else nullcontext():
        for case in (case for group in groups for case in group):
            logits, parts = [], defaultdict(list)
            for documents in [[document] for document in case.documents] if case.is_packed else [case.documents]:
                some_logits, stacks = reference.logits_and_layers(model, documents, config)
                logits += some_logits
                for stack, layers in stacks.items():
                    for i, layer in enumerate(layers):
                        parts[f"{stack} {i}"].append(layer)
            result = results[case.name] = {
                "hidden states": {layer: np.concatenate(arrays) for layer, arrays in parts.items()},
                "logits": {"": np.concatenate(logits)},
            }
            if case.is_differentiated:
                loss, gradients = reference.loss_and_gradients(model, case.documents, config)
                result |= {"loss": {"": np.array(loss)}, "gradients": nothing | gradients}
    return results


@dataclasses.dataclass
class Errors:
    """Of all arrays of one quantity.

    Attributes:
      largest: difference of any array, over its largest entry.
      where: the array of that difference.
      typical: root mean square of the differences over that of the array, and that of all arrays again.
    """

    largest: float
    where: str
    typical: float

    @classmethod
    def between(cls, given: Mapping[str, np.ndarray], true: Mapping[str, np.ndarray]) -> "Errors":
        """Where an array is zero everywhere, so must be what is given."""
        assert given.keys() == true.keys(), given.keys() ^ true.keys()
        largest, typical = {}, []
        for name, array in true.items():
            assert given[name].shape == array.shape, name
            difference, size = np.abs(given[name].astype(np.float64) - array), np.abs(array)
            largest[name] = float(difference.max() / size.max()) if size.any() else float(difference.any())
            typical.append(np.mean(difference**2) / np.mean(size**2) if size.any() else 0.0)
        where = max(largest, key=largest.__getitem__)
        return cls(largest[where], where, float(np.mean(typical) ** 0.5))


def compare(name: str) -> Iterator[dict[str, Any]]:
    """The figures of one model: a record for every dtype, case and quantity."""
    config = samples.variant(name)
    groups = cases(name, config)
    for dtype, (our_dtype, their_dtype, true_dtype) in DTYPES.items():
        weights = samples.lively_weights(config)
        if dtype == "bfloat16":
            weights = {name: array.astype(ml_dtypes.bfloat16).astype(np.float32) for name, array in weights.items()}
        true, noise = (theirs(groups, config, weights, kind) for kind in (true_dtype, their_dtype))
        mine = ours(groups, config, weights, our_dtype)
        for case, expected in true.items():
            for quantity in expected:
                yield {
                    "model": name,
                    "dtype": dtype,
                    "case": case,
                    "quantity": quantity,
                    "ours": dataclasses.asdict(Errors.between(mine[case][quantity], expected[quantity])),
                    "theirs": dataclasses.asdict(Errors.between(noise[case][quantity], expected[quantity])),
                }


def table(figures: list[dict[str, Any]]) -> str:
    """Of the figures, one row for each model, case and dtype."""
    rows: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for figure in figures:
        cell = f"{figure['ours']['largest']:.1e} / {figure['theirs']['largest']:.1e}"
        rows[figure["model"], figure["case"].replace("_", " "), figure["dtype"]][figure["quantity"]] = cell
    return _markdown(
        ["model", "case", "dtype", *QUANTITIES],
        [[*row, *(cells.get(quantity, "") for quantity in QUANTITIES)] for row, cells in rows.items()],
    )


def summary(figures: list[dict[str, Any]]) -> str:
    """Of the figures, one row for each dtype and quantity."""
    rows = []
    for dtype in DTYPES:
        for quantity in QUANTITIES:
            chosen = [figure for figure in figures if (figure["dtype"], figure["quantity"]) == (dtype, quantity)]
            ours, theirs = (np.array([figure[whose]["typical"] for figure in chosen]) for whose in ("ours", "theirs"))
            together = [float(np.mean(errors**2) ** 0.5) for errors in (ours, theirs)]
            highest = "" if quantity == "loss" else f"{(ours / theirs).max():.2f}"
            ratio = f"{together[0] / together[1]:.2f}"
            rows.append([dtype, quantity, str(len(chosen)), *(f"{error:.1e}" for error in together), ratio, highest])
    header = ["dtype", "quantity", "cases", "ours", "the reference's own", "ratio", "highest ratio of a case"]
    return _markdown(header, rows)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Compares, and writes the figures and the page after each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"those to compare; all by default: {', '.join(samples.VARIANTS)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - set(samples.VARIANTS):
        parser.error(f"no model is called {', '.join(sorted(unknown))}")
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name in arguments.models or samples.VARIANTS:
        known[name] = list(compare(name))
        print(table(known[name]), flush=True)
        FIGURES.write_text(json.dumps(known, indent=2) + "\n")
        figures = [figure for model in samples.VARIANTS for figure in known.get(model, [])]
        versions = {package: version(package) for package in ("transformers", "torch", "jax")}
        PAGE.write_text(TEXT.format(**versions, summary=summary(figures), table=table(figures)))


if __name__ == "__main__":
    main()
