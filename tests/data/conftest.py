from types import SimpleNamespace

import pytest

from gemma4_jax import sizes
from gemma4_jax.fields import to_dict
from gemma4_jax.run_config import RunConfig
from gemma4_jax.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load("bundled")


@pytest.fixture(scope="session")
def model():
    return sizes.quickstart()


@pytest.fixture(scope="session")
def make_config(model):
    """A function from changes of `data` to a run config, resolved."""

    def make(**changes):
        data = {
            "sources": {"digits": {"kind": "digits", "weight": 0.7}, "python": {"kind": "python", "weight": 0.3}},
            "seq_len": 352,
            "images_per_row": 4,
            "batch_size": 4,
        }
        return RunConfig.from_dict({"model": to_dict(model), "data": data | changes}).resolved()

    return make


@pytest.fixture(scope="session")
def rows_of():
    """A function from a batch to its rows, each the leaves of the batch by name."""

    def rows(batch):
        return [
            SimpleNamespace(**{name: leaf[b] for name, leaf in vars(batch).items() if leaf is not None})
            for b in range(len(batch.tokens))
        ]

    return rows
