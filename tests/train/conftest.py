from pathlib import Path

import pytest
from ml_collections import ConfigDict

from gemma4_jax.launch import command_line


@pytest.fixture
def tiny_config(tmp_path: Path) -> ConfigDict:
    """tiny.py, in a run directory of the test's own."""
    config = command_line.load(Path(__file__).parent / "tiny.py")
    config.run_dir = str(tmp_path / "run")
    return config


@pytest.fixture
def shallow_config(tiny_config: ConfigDict) -> ConfigDict:
    """The tiny model with one period of layers and no sharing of keys and values: it compiles in half the time."""
    tiny_config.model.text.num_layers = 2
    tiny_config.model.text.num_kv_shared_layers = 0
    return tiny_config
