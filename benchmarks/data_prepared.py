"""What prepared data and a cache save: images from JPEG files, and what is kept of them, through training's read path.

  python benchmarks/data_prepared.py [--train]

For budgets of 280 and 1,120 soft tokens and photographs of several sizes: milliseconds of processor time for what
becomes of an image (from a file: decode, resize, cut into patches; from data.cache_dir: hash the file, read them, and
compare their checksum; prepared: read them; and, as prepared data has it not, read them as records of ArrayRecord), in
turns, the median; then rows of a run with all sizes mixed (read the record, pack, read the images, write the batch),
images a second of processor time. `--train` adds a short run of the
quickstart's model from each, and the share of a step that waits for data. Files are in the page cache, as a warm disk
has them. Prints tables and writes the same as JSON.
"""

import contextlib
import dataclasses
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from gemma4_jax import sizes
from gemma4_jax.data.cache import open_cache
from gemma4_jax.data.documents import open_documents
from gemma4_jax.data.mixture import Examples
from gemma4_jax.data.pipeline import make_encoder, make_train_iterator
from gemma4_jax.data.prepare import prepare
from gemma4_jax.data.prepared import array_record, open_reader
from gemma4_jax.fields import to_dict
from gemma4_jax.run_config import RunConfig
from gemma4_jax.tokenizer import Tokenizer

SIZES = ((640, 480), (1024, 768), (2048, 1536))
BUDGETS = (280, 1120)
NUM_EACH, ROUNDS, NUM_BATCHES = 8, 7, 6
NUM_STEPS, NUM_TRAINED = 60, 24
COLUMNS = ("file", "cache", "prepared", "as_record")


def write_photographs(folder: Path, size: tuple[int, int], number: int) -> Path:
    """JSON Lines of captions of JPEG files of one size, with as much detail as a photograph has at quality 90."""
    rng = np.random.default_rng(size)
    lines = []
    for i in range(number):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(size, PIL.Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(noisy).save(file, "JPEG", quality=90)
        name = f"{size[0]}-{i}.jpg"
        (folder / name).write_bytes(file.getvalue())
        lines.append(json.dumps({"image": name, "prompt": "What is this? ", "caption": f"picture {i}"}) + "\n")
    path = folder / f"{size[0]}.jsonl"
    path.write_text("".join(lines))
    return path


def make_config(budget: int, source: dict[str, Any], cache_dir: str = "") -> RunConfig:
    """A run of the official patches, whose rows hold about four images."""
    model = sizes.quickstart()
    assert model.vision is not None
    vision = dataclasses.replace(model.vision, patch_size=16, pooling_size=3, num_positions=10240)
    text = dataclasses.replace(model.text, max_positions=8192)
    data = {
        "sources": {"photographs": source},
        "soft_tokens_per_image": budget,
        "seq_len": 4 * (budget + 40),
        "images_per_row": 4,
        "batch_size": 2,
        "cache_dir": cache_dir,
    }
    model = dataclasses.replace(model, vision=vision, text=text)
    return RunConfig.from_dict({"model": to_dict(model), "data": data}).resolved()


def in_turns(functions: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median of what each gives, called in turns."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            found[name].append(function())
    return {name: statistics.median(values) for name, values in found.items()}


def record_milliseconds(config: RunConfig, tokenizer: Tokenizer, path: Path) -> Callable[[], float]:
    """As `image_milliseconds`, of patches that are the records of an ArrayRecord file."""
    documents = open_documents(config.data.sources["photographs"])
    examples = Examples("photographs", documents, make_encoder(config, tokenizer))
    writer = array_record().ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for i in range(len(examples)):
        writer.write(examples[i].images[0].read().patches.tobytes())  # type: ignore[union-attr]
    writer.close()
    reader = open_reader(path)

    def measure() -> float:
        seconds = []
        for i in np.random.default_rng(0).permutation(len(examples)).tolist():
            start = time.thread_time()
            reader.read(i, i + 1)
            seconds.append(time.thread_time() - start)
        return 1000 * statistics.median(seconds)

    return measure


def image_milliseconds(config: RunConfig, tokenizer: Tokenizer) -> Callable[[], float]:
    """Reads each image of a source once: the median of its milliseconds."""
    cache = open_cache(config.data, num_writers=1)
    documents = open_documents(config.data.sources["photographs"])
    examples = Examples("photographs", documents, make_encoder(config, tokenizer))
    images = [image for i in range(len(examples)) for image in examples[i].images]  # type: ignore[union-attr]

    for image in images:
        image.read(cache)  # which fills it

    def measure() -> float:
        seconds = []
        for image in images:
            start = time.thread_time()
            image.read(cache)
            seconds.append(time.thread_time() - start)
        return 1000 * statistics.median(seconds)

    return measure


def images_per_core_second(config: RunConfig, tokenizer: Tokenizer) -> Callable[[], float]:
    """Makes batches of a run: images for each second of processor time, of all threads."""

    def measure() -> float:
        with contextlib.closing(make_train_iterator(config, tokenizer)) as batches:
            next(batches)
            start, num_images = time.process_time(), 0
            for _ in range(NUM_BATCHES):
                num_images += int(next(batches).patch_image_ids.max(axis=1).sum())
            return num_images / (time.process_time() - start)

    return measure


def compare(budget: int, folder: Path, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """A row of the table for each size of photograph, and one for all."""
    files = {"x".join(map(str, size)): str(folder / f"{size[0]}.jsonl") for size in SIZES}
    rows = []
    for name, path in {**files, "all, in rows": ",".join(files.values())}.items():
        source = make_config(budget, {"path": path})
        out = folder / f"prepared-{budget}-{len(rows)}"
        prepare(source, out, report=lambda _: None)
        again = make_config(budget, {"kind": "prepared", "path": str(out / "photographs")})
        measure = images_per_core_second if "," in path else image_milliseconds
        cached = make_config(budget, {"path": path}, str(folder / "cache"))
        runs = {"file": source, "cache": cached, "prepared": again}
        functions = {name: measure(run, tokenizer) for name, run in runs.items()}
        if "," not in path:
            functions["as_record"] = record_milliseconds(again, tokenizer, out / "records")
        found = in_turns(functions)
        power, unit = (1, "images a core-second") if "," in path else (-1, "ms")
        times = {kept: (found[kept] / found["file"]) ** power for kept in ("cache", "prepared")}
        rows.append({"budget": budget, "images": name, "unit": unit, **found, "times": times})
        shown = "".join(f"{found.get(column, float('nan')):>12.2f}" for column in COLUMNS)
        said = ", ".join(f"{kept} {factor:.1f} times" for kept, factor in times.items())
        print(f"{budget:>6}  {name:<14}{shown} {unit}, {said}", flush=True)
    return rows


def wait_share(source: str) -> float:
    """The share of a step that a short run of the quickstart's model waits for its data."""
    with tempfile.TemporaryDirectory() as run:
        overrides = {
            "run_dir": f"{run}/run",
            "data.sources": "{'photographs': " + source + "}",
            "train.num_steps": NUM_STEPS,
            "log.every_steps": NUM_STEPS,
            "checkpoint.every_steps": 1000,
            "evaluators.eval.every_steps": 1000,
            "evaluators.eval.num_documents": 4,
            "export.at_end": False,
        }
        flags = [f"--config.{name}={value}" for name, value in overrides.items()]
        command = [sys.executable, "-m", "gemma4_jax.launch.train", "--config=quickstart", *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(run, "run", "summary.json").read_text())["data_wait_share"]


def compare_runs(folder: Path) -> dict[str, float]:
    """The shares of a run from files and of one that is prepared."""
    (folder / "run").mkdir()
    path = str(write_photographs(folder / "run", SIZES[1], NUM_TRAINED))
    flags = ["--config=quickstart", f"--config.data.sources={{'photographs': {{'path': '{path}', 'held_out': 0.2}}}}"]
    command = [sys.executable, "-m", "gemma4_jax.launch.prepare", *flags, f"--out={folder}/prepared", "--workers=1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    sources = {
        "file": f"{{'path': '{path}', 'held_out': 0.2}}",
        "prepared": f"{{'kind': 'prepared', 'path': '{folder}/prepared/photographs'}}",
    }
    shares = {name: wait_share(source) for name, source in sources.items()}
    for name, share in shares.items():
        print(f"from {name}: {share:.1%} of a step waits for data")
    return shares


def main() -> None:
    """Measures and prints."""
    tokenizer = Tokenizer.load("bundled")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in SIZES:
            write_photographs(folder, size, NUM_EACH)
        print(f"budget  {'images':<14}" + "".join(f"{column:>12}" for column in COLUMNS))
        result: dict[str, Any] = {"rows": [row for budget in BUDGETS for row in compare(budget, folder, tokenizer)]}
        if "--train" in sys.argv:
            result["data_wait_share"] = compare_runs(folder)
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
