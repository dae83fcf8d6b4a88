"""What millions of records cost before the first of them is read, as docs/data.md has it.

  python benchmarks/data_index.py [--records=10000000]

Files of short texts are made in a temporary folder, one after another: records of JSON Lines and Parquet, and samples
of a tar, which takes a kilobyte of disk for each, and longest to make. Each is then opened as a source by a process of
its own, which says how long it took to its first document, how much of its own memory was taken by then, and how large
the index in mapped files is.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.sources import scratch
from gemma4_jax.run_config import SourceConfig

GROUP = 10_000
"""Rows of a row group of Parquet."""

READS = 1000


def write_lines(path: Path, number: int) -> None:
    """JSON Lines of 60 bytes."""
    with path.open("w") as file:
        for start in range(0, number, 2**16):
            stop = min(number, start + 2**16)
            file.writelines(f'{{"text": "record {i:010} of a file with many records"}}\n' for i in range(start, stop))


def write_parquet(path: Path, number: int) -> None:
    """A column of text."""
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    with parquet.ParquetWriter(path, arrow.schema([("text", arrow.string())])) as writer:
        for start in range(0, number, GROUP):
            texts = [f"record {i:010} of a file with many records" for i in range(start, min(number, start + GROUP))]
            writer.write_table(arrow.table({"text": texts}), row_group_size=GROUP)


def write_tar(path: Path, number: int) -> None:
    """Samples of one small file."""
    with path.open("wb") as file:
        for i in range(number):
            member = tarfile.TarInfo(f"{i:010}.txt")
            member.size = 20
            file.write(member.tobuf(tarfile.USTAR_FORMAT) + f"sample {i:013}".encode().ljust(512, b"\0"))
        file.write(bytes(1024))


KINDS = {"jsonl": write_lines, "parquet": write_parquet, "webdataset": write_tar}


def own_bytes() -> int:
    """Memory of this process that belongs to no file."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def measure(kind: str, path: str) -> dict[str, float]:
    """In a process of its own."""
    importlib.import_module("pyarrow.parquet")  # so that only what records cost is counted
    before, began = own_bytes(), time.perf_counter()
    documents = open_documents(SourceConfig("mine", kind=kind, path=path))
    document = documents[len(documents) // 2]
    assert document.segments, document
    first, memory = time.perf_counter() - began, own_bytes() - before
    index = sum(file.stat().st_size for file in Path(scratch.scratch_folder().name).iterdir())
    chosen = np.random.default_rng(0).integers(len(documents), size=READS).tolist()
    began = time.perf_counter()
    for i in chosen:
        documents[i]
    return {
        "records": len(documents),
        "seconds to the first": first,
        "bytes of memory a record": memory / len(documents),
        "bytes of index a record": index / len(documents),
        "microseconds a random read": 1e6 * (time.perf_counter() - began) / READS,
    }


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure)))
        return
    figures = {}
    for kind, write in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / kind
            write(path, given.records)
            command = [sys.executable, __file__, "--measure", kind, str(path)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures[kind] = found = json.loads(out.splitlines()[-1])
        if kind == "jsonl":
            print(f"| kind | {' | '.join(found)} |\n|---{'|---:' * len(found)}|")
        cells = [f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in found.values()]
        print(f"| `{kind}` | {' | '.join(cells)} |", flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
