"""gemma4 generate MODEL --prompt=TEXT [--image=FILE ...] [--audio=FILE ...] [--raw] [--max_new_tokens=N]
                [--temperature=T] [--top_k=K] [--top_p=P] [--seed=S] [--dtype=float32|bfloat16]

Prints what a model writes. MODEL is a folder in Hugging Face's format, a released checkpoint or an export, or the
directory of a run, whose last checkpoint is exported to a temporary folder for it. The prompt is what a user says in a
chat, after the images and sounds, if the model has a chat template; with --raw, or without a template, it is the text
that the model goes on from, in which <|image|> stands for each image and <|audio|> for each sound. Sounds are WAV,
FLAC, MP3 or OGG files of at most 30 s.

  gemma4 generate gemma-4-E2B-it --prompt="What is this?" --image=cat.png
  gemma4 generate runs/quickstart --prompt="def main(" --temperature=0.7
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gemma4_jax.errors import InputError
from gemma4_jax.fields import nearest
from gemma4_jax.files import local_path
from gemma4_jax.launch import cli


def main(arguments: Sequence[str]) -> None:
    """Generates from one prompt.

    Raises:
      InputError: an argument, the model, an image or a sound is not acceptable.
    """
    model_dir, given = _parse(arguments)

    from gemma4_jax.generation import generate

    model, processor = _load(local_path(model_dir), given.pop("dtype"))
    prompt, images, audios, is_raw = (given.pop(name) for name in ("prompt", "image", "audio", "raw"))
    if processor.chat_template is not None and not is_raw:
        media = [*({"type": "image"} for _ in images), *({"type": "audio"} for _ in audios)]
        prompt = [{"role": "user", "content": [*media, {"type": "text", "text": prompt}]}]
    (text,) = generate(model, processor, prompt, images=images, audios=audios, **given)
    print(text)


def _load(folder: Path, dtype: str | None) -> tuple[Any, Any]:
    """(model, processor) of a folder in Hugging Face's format, or of the last checkpoint of a run."""
    from gemma4_jax.hf.pretrained import load_hf
    from gemma4_jax.hf.save import export_run

    if not (folder / "checkpoints").is_dir():
        return load_hf(folder, dtype=dtype)
    with tempfile.TemporaryDirectory(prefix="gemma4-generate-") as temporary:
        export_run(folder, Path(temporary) / "export")
        return load_hf(Path(temporary) / "export", dtype=dtype)


def _parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(MODEL, flag -> value)."""
    values = flags.FlagValues()
    flags.DEFINE_string("prompt", None, "what the model goes on from", flag_values=values)
    flags.DEFINE_multi_string("image", [], "an image file", flag_values=values)
    flags.DEFINE_multi_string("audio", [], "a sound file", flag_values=values)
    flags.DEFINE_bool("raw", False, "the prompt is no chat", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 256, "tokens to write at most", flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "draw from the k likeliest", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "draw from the likeliest that reach p", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the draws", flag_values=values)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "of the model", flag_values=values)
    try:
        positional = values(["gemma4", *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        near = nearest(error.flagname, values)
        raise InputError(
            f"--{error.flagname} is not possible: there is no such flag, the nearest is --{near}."
        ) from error
    except flags.Error as error:
        raise InputError(" ".join(str(error).split()).rstrip(" ?.") + ".") from error
    if len(positional) != 1:
        raise InputError(f"generate takes one MODEL, and was given {' '.join(positional) or 'none'}.")
    given: dict[str, Any] = {name: values[name].value for name in values}
    for name in ("image", "audio"):
        given[name] = [str(local_path(file)) for file in given[name]]
    if given["prompt"] is None:
        raise InputError('--prompt is needed: what the model goes on from, such as --prompt="Tell me a story."')
    return positional[0], given


def help_text() -> str:
    """What `gemma4 generate --help` prints."""
    return (__doc__ or "").strip()


if __name__ == "__main__":
    sys.exit(cli.main(["generate", *sys.argv[1:]]))
