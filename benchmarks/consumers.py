"""Whether other programs compute from an export what this package computes: docs/consumers.md.

  python benchmarks/consumers.py                         # every consumer, each in a virtual environment of its own
  python benchmarks/consumers.py --only mlx-lm KerasHub  # these again; the other lines of the page stay
  python benchmarks/consumers.py --venvs ~/venvs         # keeps the environments and uses those that are there

Runs on a CPU, from the repository root, for its models are those of the tests. Packages come from the index that pip is
set up for; llama.cpp is compiled, which takes a while. A consumer that cannot be installed or run gets a line with the
reason. The page is written from consumers.json beside this file.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).parents[1] / "docs" / "consumers.md"
FIGURES = Path(__file__).with_suffix(".json")
BUDGET = 70
TORCH = "torch==2.13.0"
IMAGE_SIZE = (108, 84)
"""9 x 7 soft tokens of 3 x 3 patches of 4 pixels: the budget leaves it as it is."""

TEXT, ABOUT_IMAGE = "def read(path):\n    return 4071", "See <|image|> what is it?"

Answer = dict[str, Any]
"""{"text": largest difference or reason, "images": the same, "note": what a reader should know}."""


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A program that reads exports.

    Attributes:
      package: whose version is told.
      requirements: what pip installs for it.
      probe: computes its answer, in its own environment, from the folder of `make_exports`.
      source: a package whose source archive the probe needs beside it, unpacked.
    """

    package: str
    requirements: tuple[str, ...]
    probe: Callable[[Path, Path], Answer]
    source: str | None = None


def difference(given: Any, expected: np.ndarray) -> float:
    """The largest difference, over the largest expected value."""
    given = np.asarray(given, np.float32)
    if given.shape != expected.shape:
        raise ValueError(f"logits of shape {given.shape} in place of {expected.shape}")
    return float(np.abs(given - expected).max() / np.abs(expected).max())


def attempt(measure: Callable[[], float | str]) -> float | str:
    """What was found, or in one line why nothing was."""
    try:
        return measure()
    except BaseException as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def probe_transformers(work: Path, _: Path) -> Answer:
    """Logits through its model, with images through its own image processor."""
    import PIL.Image
    import torch
    import transformers

    expected = np.load(work / "expected.npz")
    model = transformers.Gemma4ForConditionalGeneration.from_pretrained(
        work / "images", dtype=torch.float32, attn_implementation="eager"
    )

    def logits(tokens: np.ndarray, **images: Any) -> Any:
        ids = torch.from_numpy(tokens[None]).long()
        kinds = (ids == model.config.image_token_id).long()
        with torch.no_grad():
            return model(input_ids=ids, mm_token_type_ids=kinds, **images, use_cache=True).logits[0].numpy()

    def about_image() -> float:
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(work / "images")
        except ImportError:  # old versions look for torchvision before they look for Pillow
            from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

            processor = Gemma4ImageProcessorPil.from_pretrained(work / "images")
        images = processor([PIL.Image.open(work / "image.png")], return_tensors="pt")
        images.pop("num_soft_tokens_per_image", None)
        return difference(logits(expected["image_tokens"], **images), expected["image_logits"])

    return {
        "text": attempt(lambda: difference(logits(expected["text_tokens"]), expected["text_logits"])),
        "images": attempt(about_image),
    }


def probe_mlx_lm(work: Path, _: Path) -> Answer:
    """It reads text alone."""
    import mlx.core as mx
    import mlx_lm

    expected = np.load(work / "expected.npz")

    def text() -> float:
        model, _ = mlx_lm.load(str(work / "images"))
        tokens = mx.array(expected["text_tokens"][None].tolist())
        return difference(np.array(model(tokens)[0].astype(mx.float32)), expected["text_logits"])

    return {"text": attempt(text), "images": "not read by this program"}


def probe_keras_hub(work: Path, _: Path) -> Answer:
    """Its backbone on tokens, and the head that is tied to the embedding."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras_hub

    expected = np.load(work / "expected.npz")

    def text() -> float:
        model = keras_hub.models.Gemma4CausalLM.from_preset(str(work / "text"), preprocessor=None, dtype="float32")
        tokens = expected["text_tokens"][None]
        places = np.arange(tokens.shape[1])[None]
        logits = model({"token_ids": tokens, "padding_mask": np.ones_like(tokens), "position_ids": places})
        return difference(np.asarray(logits)[0], expected["text_only_logits"])

    def images() -> str:
        keras_hub.models.Gemma4CausalLM.from_preset(str(work / "images"), dtype="float32")
        return "loaded, with tower and image converter; its logits are not compared"

    return {"text": attempt(text), "images": attempt(images)}


WIDE_CACHE = {"type_k": 0, "type_v": 0}
"""llama.cpp keeps keys and values in float16 unless it is told float32, which is its type 0."""


def probe_llama_cpp(work: Path, source: Path) -> Answer:
    """Converted by the script in its source archive; text at all positions, an image at the last one."""
    import llama_cpp

    expected = np.load(work / "expected.npz")
    converter = source / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"

    def convert(*options: str) -> Path:
        out = work / f"model{'-'.join(options)}.gguf"
        command = [sys.executable, converter, work / "images", "--outtype", "f32", "--outfile", out, *options]
        environment = os.environ | {"PYTHONPATH": str(converter.parent / "gguf-py")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return out

    def load() -> Any:
        return llama_cpp.Llama(str(convert()), n_ctx=512, n_batch=512, logits_all=True, verbose=False, **WIDE_CACHE)

    def text() -> float:
        model = load()
        tokens = expected["text_tokens"].tolist()
        model.eval(tokens)
        return difference(model.scores[: len(tokens)], expected["text_logits"])

    def images() -> float:
        return difference(_llama_cpp_image(load(), convert("--mmproj"), work), expected["image_logits"][-1])

    note = "it rounds to float16 in between; an image that needs no resizing, of soft tokens of 3 x 3 patches"
    return {"text": attempt(text), "images": attempt(images), "note": note}


def _llama_cpp_image(model: Any, projector: Path, work: Path) -> np.ndarray:
    """[V] logits at the end of the document with an image."""
    import ctypes

    import llama_cpp
    from llama_cpp import mtmd_cpp as mtmd

    parameters = mtmd.mtmd_context_params_default()
    parameters.use_gpu, parameters.image_min_tokens, parameters.image_max_tokens = False, 1, BUDGET
    context = mtmd.mtmd_init_from_file(str(projector).encode(), model.model, parameters)
    if context is None:
        raise RuntimeError("the projector cannot be loaded")
    bitmap = mtmd.mtmd_helper_bitmap_init_from_file(context, str(work / "image.png").encode(), False)
    prompt = ABOUT_IMAGE.replace("<|image|>", mtmd.mtmd_default_marker().decode()).encode()
    text = mtmd.mtmd_input_text(text=prompt, text_len=len(prompt), add_special=True, parse_special=True)
    chunks = mtmd.mtmd_input_chunks_init()
    if mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1):
        raise RuntimeError("the document cannot be tokenized")
    count, expected = mtmd.mtmd_helper_get_n_tokens(chunks), len(np.load(work / "expected.npz")["image_tokens"])
    if count != expected:
        raise ValueError(f"{count} tokens in place of {expected}")
    past = llama_cpp.llama_pos(0)
    if mtmd.mtmd_helper_eval_chunks(context, model.ctx, chunks, 0, 0, 512, True, ctypes.byref(past)):
        raise RuntimeError("the document cannot be evaluated")
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).copy()


CONSUMERS = {
    "transformers, oldest": Consumer("transformers", ("transformers==5.5.0", TORCH, "pillow"), probe_transformers),
    "transformers, newest": Consumer("transformers", ("transformers", TORCH, "pillow"), probe_transformers),
    "llama.cpp": Consumer(
        "llama-cpp-python",
        ("llama-cpp-python", TORCH, "transformers", "sentencepiece", "protobuf", "pyyaml"),
        probe_llama_cpp,
        source="llama-cpp-python",
    ),
    "mlx-lm": Consumer("mlx-lm", ("mlx[cpu]", "mlx-lm"), probe_mlx_lm),
    "KerasHub": Consumer("keras-hub", ("keras-hub", "jax", "safetensors", TORCH), probe_keras_hub),
}


def make_exports(work: Path) -> None:
    """Writes the folders `images` and `text`, image.png, and expected.npz with tokens and logits."""
    import PIL.Image
    from flax import nnx

    import gemma4_jax
    from gemma4_jax import sizes
    from gemma4_jax.hf.save import export_state
    from gemma4_jax.tokenizer import Tokenizer
    from tests.hf import samples

    whole = sizes.tiny()
    assert whole.vision is not None
    whole = dataclasses.replace(whole, vision=dataclasses.replace(whole.vision, pooling_size=3, num_positions=210))
    arrays = {}
    for name, config in (("images", whole), ("text", dataclasses.replace(whole, vision=None))):
        state = nnx.state(samples.model(config, samples.restless_weights(config)))
        tokenizer = Tokenizer.load("bundled")
        export_state(state, config, work / name, tokenizer=tokenizer, max_soft_tokens=BUDGET)
    model, processor = gemma4_jax.load_hf(work / "images")
    rng = np.random.default_rng(0)
    PIL.Image.fromarray(rng.integers(0, 256, (15, 20, 3)).astype(np.uint8)).resize(IMAGE_SIZE).save(work / "image.png")
    batches = {"text": processor(TEXT), "image": processor(ABOUT_IMAGE, images=[work / "image.png"])}
    for name, batch in batches.items():
        length = int((batch.segment_ids[0] > 0).sum())
        arrays[f"{name}_tokens"] = np.asarray(batch.tokens[0, :length])
        arrays[f"{name}_logits"] = np.asarray(model(batch))[0, :length]
    text_only, processor = gemma4_jax.load_hf(work / "text")
    length = len(arrays["text_tokens"])
    arrays["text_only_logits"] = np.asarray(text_only(processor(TEXT)))[0, :length]
    np.savez(work / "expected.npz", **arrays)


def run(name: str, consumer: Consumer, work: Path, venvs: Path) -> Answer:
    """Installs a consumer, unless it is there, and lets it answer; {"reason"} if that is not possible."""
    venv = venvs / name.replace(",", "").replace(" ", "_")
    python, source = venv / "bin" / "python", venv / "source"
    try:
        if not (venv / "complete").exists():
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *consumer.requirements], check=True)
            if consumer.source:
                options = ["--no-deps", "--no-binary", ":all:", "-d", source]
                subprocess.run([python, "-m", "pip", "download", "-q", *options, consumer.source], check=True)
                (archive,) = source.glob("*.tar.gz")
                with tarfile.open(archive) as content:
                    content.extractall(source, filter="data")
            (venv / "complete").touch()
        unpacked = next((path for path in source.glob("*") if path.is_dir()), source)
        command = [python, __file__, "--probe", name, str(work), str(unpacked)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.SubprocessError, OSError, RuntimeError, ValueError) as error:
        return {"reason": " ".join(str(error).split())[:160]}


def write_page(answers: Mapping[str, Answer]) -> None:
    """docs/consumers.md, from what was found."""
    lines = []
    for name in CONSUMERS:
        answer = answers.get(name, {"reason": "it was not tried"})
        cells = [f"not run: {answer['reason']}"] * 2 if "reason" in answer else [answer["text"], answer["images"]]
        shown = [f"{cell:.1e}" if isinstance(cell, float) else cell for cell in cells]
        lines.append(f"| {name} | {answer.get('version', '')} | {shown[0]} | {shown[1]} | {answer.get('note', '')} |")
    PAGE.write_text(PAGE_TEXT.format(table="\n".join(line.replace("\n", " ") for line in lines)))


PAGE_TEXT = """# Who reads an export, and what it computes

Written by `python benchmarks/consumers.py`, which runs each program on a CPU, in an environment of its own, on a model
of 160,000 random parameters with every architectural part of the decoder and the vision tower. The figures are the
largest difference from our logits, over the largest logit, in float32.

| | version | text | images | |
|---|---|---:|---:|---|
{table}

What was changed so that they all read the same:

- `rope_type` of the vision tower is "default". Versions of transformers before 5.17 know no other name for it, and
  those after it take it for their own, "axial". The oldest, 5.5.0, is right with its cache alone: without one, layers
  that share keys and values have none.
- `vocab_size` stands in config.json itself too: mlx-lm looks nowhere else.
- `feature_extractor` has every field that transformers saves: KerasHub has no defaults for them.
- A decoder alone is exported as `Gemma4ForCausalLM`.

llama.cpp takes for granted that a soft token is 3 x 3 patches, and sizes images by bounds of its own, from 70 to 1,120
soft tokens (`--image-min-tokens`, `--image-max-tokens`), and resizes them in its own way: an image of coarse noise
that is shrunk from 200 x 150 pixels to 108 x 84 moves logits by 0.3 of the largest. The quickstart pools 2 x 2,
so llama.cpp reads its text alone; its model card says so. With soft tokens of 3 x 3 patches its vision tower sees 2.25
times as many patches: with one attention head in place of two a step takes about as long, and after 600 steps it read
76% of the numbers, not 94%; with both heads a step took more than twice as long, when attention still paid for the
largest image that a row might hold.
"""


def main() -> None:
    """Probes, in the environment of a consumer, or else runs them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONSUMERS, default=list(CONSUMERS), metavar="NAME")
    parser.add_argument("--venvs", type=Path, help="where environments are kept; a temporary folder without it")
    parser.add_argument("--probe", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        from importlib.metadata import version

        name, work, source = arguments.probe
        answer = CONSUMERS[name].probe(Path(work), Path(source))
        print("\n" + json.dumps(answer | {"version": version(CONSUMERS[name].package)}))
        return
    answers = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    sys.path.insert(0, str(PAGE.parents[1]))
    with tempfile.TemporaryDirectory() as folder:
        make_exports(Path(folder))
        for name in arguments.only:
            answers[name] = run(name, CONSUMERS[name], Path(folder), (arguments.venvs or Path(folder)).absolute())
            print(f"{name}: {json.dumps(answers[name])}")
    FIGURES.write_text(json.dumps(answers, indent=2) + "\n")
    write_page(answers)
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
