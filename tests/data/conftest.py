from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from gemma4_jax import sizes
from gemma4_jax.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load("bundled")


@pytest.fixture(scope="session")
def model():
    return sizes.quickstart()


@pytest.fixture
def make_config():
    """A function from changes of `config.data` to a run config, as far as the data pipeline reads it."""

    def make(num_documents=20, eval_source="", **changes):
        data = {
            "mixture": {"digits": 0.7, "python": 0.3},
            "sources": {},
            "seq_len": 352,
            "images_per_row": 4,
            "patches_per_row": 1120,
            "soft_tokens_per_image": 70,
            "batch_size": 4,
            "num_workers": 0,
            "long_masked": "drop",
            "max_left_out": 0.5,
            "allow_changes": False,
            "seed": 0,
        }
        return ConfigDict(
            {
                "tokenizer": "bundled",
                "data": data | changes,
                "eval": {"source": eval_source, "num_documents": num_documents},
            }
        )

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
