"""Speed of what data costs on one core: chats to tokens, and JPEG files to patches, beside what others use for it.

  python benchmarks/data.py                     # about two minutes; prints tables and writes data.json beside this file

Chats: the tokens a second of `ChatTemplate.encode`, which renders, tokenizes and tells what the model writes, beside
the library `tokenizers` alone on the texts that were rendered, and transformers' `apply_chat_template`. The vocabulary
of 32,768 tokens is trained here, on the sources of Python's standard library; chats are made of the same sources.

Images: the JPEG files of a few sizes to patches, `data.images.read_patches`, beside transformers' two processors of
Gemma 4, given the Pillow image of each file: the one on Pillow, and that on torchvision where it is installed. Pixels
equal those of the first, which is checked.

Everything runs in one thread, the contestants in turn, and seconds are those that the processor worked. A figure is the
median of the rounds, a ratio the median of the ratios within a round.
"""

import argparse
import io
import json
import os
import random
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tokenizers

from gemma4_jax.chat import ChatTemplate
from gemma4_jax.data.images import read_patches
from gemma4_jax.data.sources.python_source import standard_library_files
from gemma4_jax.tokenizer import NAMES, Tokenizer
from gemma4_jax.vision.geometry import SOFT_TOKEN_BUDGETS

ROOT = Path(__file__).parents[1]
FIGURES = Path(__file__).with_suffix(".json")
VOCAB_SIZE = 32768
WORDS = {"short": (2, 20, 60), "long": (6, 40, 250)}
"""Of a chat: turns of the user, words in one, and in an answer."""
SIZES = {"640 x 480": (480, 640), "1024 x 768": (768, 1024), "2048 x 1536": (1536, 2048)}
BUDGETS = (280, 1120)
CELLS = {"patch_size": 16, "pooling_size": 3}


def rates(contestants: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, float]]:
    """What each makes in a second of a core, and what the first makes over it, in the same round."""
    seen: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            start = time.process_time()
            made = work()
            seen[name].append(made / (time.process_time() - start))
    first = next(iter(seen.values()))
    return {
        name: {
            "a second": statistics.median(values),
            "ratio": statistics.median(ours / theirs for ours, theirs in zip(first, values, strict=True)),
        }
        for name, values in seen.items()
    }


def make_tokenizer(folder: Path) -> Tokenizer:
    """As the bundled one is made, with a larger vocabulary and every special token of chats."""
    maker = runpy.run_path(str(ROOT / "data" / "bundled" / "make_tokenizer.py"))
    settings = maker["learned_tokens"].__globals__
    settings["SPECIAL_TOKENS"] = tuple(dict.fromkeys((*maker["SPECIAL_TOKENS"], *NAMES.values())))
    settings["VOCAB_SIZE"] = VOCAB_SIZE
    settings["__file__"] = str(folder / "make_tokenizer.py")  # it writes beside itself
    maker["main"]()
    return Tokenizer(folder / "tokenizer.json")


def chats(num_turns: int, asked: int, answered: int, number: int) -> list[list[dict[str, str]]]:
    """Conversations of words of the standard library."""
    words = [word for path in standard_library_files()[:40] for word in path.read_text("utf-8").split(" ")]
    draw = random.Random(0)

    def said(length: int) -> str:
        start = draw.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    return [
        [
            {"role": role, "content": said(length)}
            for _ in range(num_turns)
            for role, length in (("user", asked), ("assistant", answered))
        ]
        for _ in range(number)
    ]


def measure_chats(tokenizer: Tokenizer, source: str, rounds: int) -> dict[str, Any]:
    """Kind of chat -> figures of each."""
    import transformers

    template = ChatTemplate(source, tokenizer)
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path), bos_token="<bos>")
    library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    found = {}
    for kind, shape in WORDS.items():
        talks = chats(*shape, number=60)
        texts = [tokenizer.decode(template.encode(talk)[0]) for talk in talks]

        def ours(talks: list[list[dict[str, str]]] = talks) -> int:
            return sum(len(template.encode(talk)[0]) for talk in talks)

        def theirs(texts: list[str] = texts) -> int:
            return sum(len(library.encode(text, add_special_tokens=False).ids) for text in texts)

        def peer(talks: list[list[dict[str, str]]] = talks) -> int:
            given = {"chat_template": source, "return_dict": False}
            return sum(len(reference.apply_chat_template(talk, **given)) for talk in talks)

        assert ours() == theirs() == peer()
        contestants = {"ours": ours, "tokenizers": theirs, "transformers": peer}
        found[kind] = {"tokens": ours() / len(talks), **rates(contestants, rounds)}
    return found


def jpeg(height: int, width: int) -> bytes:
    """A file with colours and noise like those of a photograph, of quality 90."""
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = np.asarray(PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC), int)
    pixels = (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def processors() -> dict[str, Callable[..., Any]]:
    """Name -> processor of the reference that can be had here."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    found: dict[str, Callable[..., Any]] = {"Pillow": Gemma4ImageProcessorPil()}
    try:
        import torchvision  # noqa: F401
        from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor
    except (ImportError, RuntimeError):
        return found
    return {**found, "torchvision": Gemma4ImageProcessor()}


def measure_images(rounds: int) -> dict[str, Any]:
    """Size and budget -> figures of each."""
    found, theirs = {}, processors()
    for size, sides in SIZES.items():
        file = jpeg(*sides)
        for budget in BUDGETS:
            assert budget in SOFT_TOKEN_BUDGETS

            def ours(file: bytes = file, budget: int = budget) -> int:
                read_patches(file, max_soft_tokens=budget, **CELLS)
                return 1

            contestants = {"ours": ours}
            for name, processor in theirs.items():

                def reference(processor: Any = processor, file: bytes = file, budget: int = budget) -> int:
                    processor(PIL.Image.open(io.BytesIO(file)), max_soft_tokens=budget)
                    return 1

                contestants[name] = reference
            check_pixels(file, budget, theirs["Pillow"])
            found[f"{size}, {budget}"] = rates(contestants, rounds)
    return found


def check_pixels(file: bytes, budget: int, processor: Callable[..., Any]) -> None:
    """That our patches are those of the processor on Pillow."""
    ours = read_patches(file, max_soft_tokens=budget, **CELLS)
    theirs = processor(PIL.Image.open(io.BytesIO(file)), max_soft_tokens=budget, return_tensors="np")
    raster = np.lexsort((ours.positions[:, 0], ours.positions[:, 1]))
    levels = np.rint(theirs["pixel_values"][0, : len(raster)] * 255).astype(np.uint8)
    np.testing.assert_array_equal(ours.patches[raster], levels)


def tables(figures: Mapping[str, Any]) -> str:
    """As docs/data.md has them."""
    lines = ["| chats | tokens in one | tokens a second | over `tokenizers` alone | over transformers |"]
    lines.append("|---|---:|---:|---:|---:|")
    for kind, seen in figures["chats"].items():
        over = " | ".join(f"{seen[name]['ratio']:.2f}" for name in ("tokenizers", "transformers"))
        lines.append(f"| {kind} | {seen['tokens']:,.0f} | {seen['ours']['a second']:,.0f} | {over} |")
    names = [name for name in next(iter(figures["images"].values())) if name != "ours"]
    lines += [
        "",
        "| JPEG, budget | images a second | " + " | ".join(f"over the {name} processor" for name in names) + " |",
    ]
    lines.append("|---|---:|" + "---:|" * len(names))
    for case, seen in figures["images"].items():
        over = " | ".join(f"{seen[name]['ratio']:.2f}" for name in names)
        lines.append(f"| {case} | {seen['ours']['a second']:.1f} | {over} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--template", type=Path, default=ROOT / "tests" / "chat_templates" / "gemma4.jinja")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
        found = measure_chats(tokenizer, options.template.read_text("utf-8"), options.rounds)
    figures = {"chats": found, "images": measure_images(options.rounds)}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    print(tables(figures))


if __name__ == "__main__":
    main()
