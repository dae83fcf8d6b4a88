"""How full rows are by several ways of packing, as a table of docs/data.md.

  python benchmarks/packing.py [--num_documents=20000]

The documents are short chats (30%), long texts (10%), and one to four images of 50 sizes with what is said of them
(60%). A row has room for 1.15 times the patches that its tokens bring on average, so that patches are full to 87% if no
token is free. `ours` chooses with the look-ahead of training; Grain's packers have as many bins, and twice as many.
"""

import argparse
from collections.abc import Iterator

import grain
import numpy as np

from gemma4_jax.data.pack import choose
from gemma4_jax.data.packer import LOOKAHEAD

SLACK = 1.15


def mixture(num_documents: int, seq_len: int, seed: int = 0) -> np.ndarray:
    """[n, 4] sizes of documents, none longer than a row: tokens, images, patches, frames."""
    rng = np.random.default_rng(seed)
    sizes = []
    for kind in rng.choice(3, num_documents, p=[0.3, 0.1, 0.6]):
        num_images = rng.choice([1, 1, 1, 2, 3, 4]) if kind == 2 else 0
        soft = int(rng.choice(np.linspace(30, 280, 50).astype(int), num_images).sum())
        said = int(np.clip(rng.lognormal(*[(5.3, 0.7), (7.6, 0.6), (4.3, 0.8)][kind]), 10, seq_len - 1200))
        sizes.append((said + soft + 2 * num_images, num_images, 9 * soft, 0))
    return np.array(sizes)


def ours(sizes: np.ndarray, room: np.ndarray) -> Iterator[np.ndarray]:
    """Rows as training packs them, each the sum of the sizes in it."""
    waiting = list(range(len(sizes)))
    while len(waiting) >= LOOKAHEAD:
        chosen = {waiting[i] for i in choose(sizes[waiting[:LOOKAHEAD]], room)}
        yield sizes[sorted(chosen)].sum(axis=0)
        waiting = [i for i in waiting[:LOOKAHEAD] if i not in chosen] + waiting[LOOKAHEAD:]


def longest_first(sizes: np.ndarray, room: np.ndarray) -> Iterator[np.ndarray]:
    """The oldest, then the longest that fits, with the same look-ahead."""
    waiting = list(range(len(sizes)))
    while len(waiting) >= LOOKAHEAD:
        chosen, used = {waiting[0]}, sizes[waiting[0]].copy()
        for i in sorted(waiting[1:LOOKAHEAD], key=lambda i: -sizes[i][0]):
            if (used + sizes[i] <= room).all():
                chosen.add(i)
                used += sizes[i]
        yield used
        waiting = [i for i in waiting[:LOOKAHEAD] if i not in chosen] + waiting[LOOKAHEAD:]


def one_after_another(sizes: np.ndarray, room: np.ndarray) -> Iterator[np.ndarray]:
    """In the order in which they come, each row closed by the first that does not fit."""
    used = np.zeros_like(room)
    for size in sizes:
        if not (used + size <= room).all():
            yield used
            used = np.zeros_like(room)
        used = used + size
    yield used


def padded(sizes: np.ndarray, room: np.ndarray) -> Iterator[np.ndarray]:
    """A row for each document."""
    yield from sizes


def by_grain(packer: type, num_bins: int, sizes: np.ndarray, room: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of one of Grain's packers."""
    elements = [{"tokens": np.ones(size[0], np.int8), "patches": np.ones(size[2], np.int8)} for size in sizes]
    documents = grain.MapDataset.source(elements).to_iter_dataset()
    lengths = {"tokens": int(room[0]), "patches": int(room[2])}
    for row in packer(documents, length_struct=lengths, num_packing_bins=num_bins):
        yield np.array([row["tokens"].sum(), 0, row["patches"].sum(), 0])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_documents", type=int, default=20_000)
    num_documents = parser.parse_args().num_documents
    ways = {
        f"gemma4-jax, look-ahead {LOOKAHEAD}": ours,
        "the longest that fits, same look-ahead": longest_first,
        "one after another": one_after_another,
        "a row for each document": padded,
    }
    for name, packer in (
        ("best fit", grain.experimental.BestFitPackIterDataset),
        ("first fit", grain.experimental.FirstFitPackIterDataset),
    ):
        for bins in (LOOKAHEAD, 2 * LOOKAHEAD):
            ways[f"Grain, {name}, {bins} bins"] = lambda s, r, p=packer, b=bins: by_grain(p, b, s, r)
    print("| | tokens, T 8,192 | patches | tokens, T 4,096 | patches |\n| --- | ---: | ---: | ---: | ---: |")
    shares: dict[str, list[str]] = {name: [] for name in ways}
    for seq_len in (8192, 4096):
        sizes = mixture(num_documents, seq_len)
        patches = 9 * int(SLACK / 9 * seq_len * sizes[:, 2].sum() / sizes[:, 0].sum())
        room = np.array([seq_len, 64, patches, 0])
        for name, pack in ways.items():
            full = np.mean(list(pack(sizes, room)), axis=0) / np.maximum(room, 1)
            shares[name] += [f"{full[0]:.1%}", f"{full[2]:.1%}"]
    for name, figures in shares.items():
        print(f"| {name} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
