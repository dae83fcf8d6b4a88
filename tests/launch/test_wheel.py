"""An installed wheel holds the whole package, and needs no clone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {"gemma4_jax": "gemma4_jax"} | {room: f"gemma4_jax/{room}" for room in ("data", "train", "configs", "launch")}


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = f"egg_info --egg-base {folder} build --build-base {folder}/build bdist_wheel --dist-dir {folder}".split()
    program = "import setuptools; setuptools.setup()"
    subprocess.run([sys.executable, "-c", program, "--quiet", *build], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_every_module_and_every_asset_is_in_the_wheel(unpacked_wheel):
    missing = []
    for room, place in ROOMS.items():
        files = [path for path in (ROOT / room).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        missing += [path for path in files if not (unpacked_wheel / place / path.relative_to(ROOT / room)).is_file()]
    assert missing == []
    assert (unpacked_wheel / "gemma4_jax/data/bundled/digits.npz").stat().st_size > 0


def test_nothing_lands_beside_the_package(unpacked_wheel):
    names = {path.name for path in unpacked_wheel.iterdir() if path.suffix != ".dist-info"}
    assert names == {"gemma4_jax"}


def test_shipped_configs_work_from_the_wheel(unpacked_wheel, tmp_path):
    finished = subprocess.run(
        [sys.executable, "-m", "gemma4_jax.launch.train", "--config=quickstart", "--config.seed=-1"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked_wheel)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stderr == "gemma4: seed=-1 is not possible: it must be between 0 and 2**32 - 1.\n"
    assert finished.returncode == 2
