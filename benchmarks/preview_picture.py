"""Draws docs/preview.png, the top of the page that `gemma4 preview --config=quickstart` writes.

python benchmarks/preview_picture.py    # needs chromium
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

import PIL.Image

from gemma4_jax.configs import quickstart
from gemma4_jax.data.preview import preview
from gemma4_jax.run_config import RunConfig

PICTURE = Path(__file__).parents[1] / "docs" / "preview.png"
WIDTH, HEIGHT = 1100, 1480
COLOURS = 128


def main() -> None:
    """Writes the picture."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("chromium is not installed: the picture cannot be drawn.")
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "page.html"), Path(folder, "page.png")
        preview(RunConfig.from_dict(quickstart.get_config().to_dict()).resolved(), page, print)
        options = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={WIDTH},{HEIGHT}",
        )
        subprocess.run(
            [browser, *options, f"--screenshot={shot}", page.as_uri()], check=True, stderr=subprocess.DEVNULL
        )
        picture = PIL.Image.open(shot).convert("RGB").quantize(COLOURS, dither=PIL.Image.Dither.NONE)
        picture.save(PICTURE, optimize=True)
    print(f"wrote {PICTURE}, {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
