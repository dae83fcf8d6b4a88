"""What a run sees is a function of its config: processes, workers and threads only share out who reads it."""

import contextlib
import hashlib
import json

import numpy as np
import PIL.Image
import pytest

from gemma4_jax.batch import FIELDS
from gemma4_jax.data import iterator
from gemma4_jax.data.iterator import join_states
from gemma4_jax.data.pipeline import make_train_iterator

BATCH_SIZE, NUM_DOCUMENTS = 8, 10_000


@pytest.fixture(scope="module")
def config(make_config, tmp_path_factory):
    """A run on short and long texts and on pictures, ten thousand documents in all."""
    folder = tmp_path_factory.mktemp("mine")
    rng = np.random.default_rng(0)
    for i in range(20):
        PIL.Image.new("RGB", (20 + 4 * i, 60), (i, 9 * i, 0)).save(folder / f"{i}.jpg")
    texts = [{"text": f"document {i}" + " and more" * int(n)} for i, n in enumerate(rng.integers(0, 60, 9000))]
    pictures = [{"image": f"{i % 20}.jpg", "text": f"picture {i}"} for i in range(1000)]
    for name, records in {"texts": texts, "pictures": pictures}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = {
        "texts": {"path": str(folder / "texts.jsonl"), "weight": 0.9},
        "pictures": {"path": str(folder / "pictures.jsonl"), "weight": 0.1},
    }

    def make(num_workers=0):
        return make_config(sources=sources, batch_size=BATCH_SIZE, num_workers=num_workers)

    return make


class Hosts:
    """As many processes, as far as the data goes: their parts of each batch, in order, and their joined state."""

    def __init__(self, config, tokenizer, count, state=None):
        self.iterators = [
            make_train_iterator(config, tokenizer, process_index=i, process_count=count) for i in range(count)
        ]
        for one in self.iterators if state is not None else ():
            one.set_state(state)

    def rows(self, num_batches):
        """A hash of each row."""
        hashes = []
        for _ in range(num_batches):
            parts = [next(one) for one in self.iterators]
            batch = {name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS}
            for row in range(BATCH_SIZE):
                digest = hashlib.blake2b()
                for array in batch.values():
                    digest.update(np.ascontiguousarray(array[row]).tobytes())
                hashes.append(digest.hexdigest())
        return hashes

    def state(self):
        return json.loads(json.dumps(join_states(one.get_state() for one in self.iterators)))

    def close(self):
        for one in self.iterators:
            one.close()


@pytest.fixture(scope="module")
def whole(config, tokenizer):
    """The rows of a run that nothing interrupts, over all of its documents, and its state at every batch."""
    with contextlib.closing(Hosts(config(), tokenizer, 1)) as hosts:
        rows, states = [], [hosts.state()]
        read = 0
        while read < NUM_DOCUMENTS:
            rows += hosts.rows(1)
            states.append(hosts.state())
            read = sum(
                shard["tally"][name]["documents"] for shard in states[-1]["shards"].values() for name in shard["tally"]
            )
        assert len(set(rows)) > 0.99 * len(rows)
        return rows, states


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_processes_goes_on_from_any_batch(count, whole, config, tokenizer):
    rows, states = whole
    last = len(states) - 1
    for start in np.random.default_rng(count).integers(0, last - 10, 5).tolist():
        with contextlib.closing(Hosts(config(), tokenizer, count, states[start])) as hosts:
            assert hosts.rows(10) == rows[BATCH_SIZE * start : BATCH_SIZE * (start + 10)]
            assert hosts.state() == states[start + 10]


def test_one_process_then_four_then_two_repeat_and_skip_nothing(whole, config, tokenizer):
    rows, states = whole
    seen, state, done = [], None, 0
    for count, stop in ((1, 40), (4, 90), (2, len(states) - 1)):
        with contextlib.closing(Hosts(config(), tokenizer, count, state)) as hosts:
            seen += hosts.rows(stop - done)
            state, done = hosts.state(), stop
    assert seen == rows
    assert state == states[-1]


@pytest.mark.parametrize("num_workers", [1, 4])
def test_any_number_of_workers_goes_on_from_any_batch(num_workers, whole, config, tokenizer):
    rows, states = whole
    start = 7 * num_workers
    with contextlib.closing(
        Hosts(config(num_workers), tokenizer, 2 if num_workers == 1 else 1, states[start])
    ) as hosts:
        assert hosts.rows(5) == rows[BATCH_SIZE * start : BATCH_SIZE * (start + 5)]
        assert hosts.state() == states[start + 5]


def test_threads_change_nothing(whole, config, tokenizer, monkeypatch):
    rows, states = whole
    monkeypatch.setattr(iterator.os, "cpu_count", lambda: 7)
    with contextlib.closing(Hosts(config(), tokenizer, 1, states[3])) as hosts:
        assert hosts.rows(20) == rows[BATCH_SIZE * 3 : BATCH_SIZE * 23]


def test_going_on_reads_nothing_until_its_rows_come(whole, config, tokenizer, monkeypatch):
    _, states = whole
    monkeypatch.setattr("gemma4_jax.data.documents.Documents.__getitem__", lambda self, index: pytest.fail("read"))
    with contextlib.closing(Hosts(config(), tokenizer, 1, states[5])) as hosts:
        assert hosts.state() == states[5]
