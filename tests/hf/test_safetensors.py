import json
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma4_jax.errors import InputError
from gemma4_jax.hf import safetensors
from gemma4_jax.hf.safetensors import DTYPES, OutgoingTensor, TensorFile, in_blocks, write_tensor_file

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "scalar": np.float32(-np.inf).reshape(()),
    "empty": np.zeros((0, 5), np.float32),
    "b.weight": np.linspace(-1, 1, 7).astype(ml_dtypes.bfloat16),
    "half": np.ones((2, 1), np.float16),
}


def outgoing(arrays) -> list[OutgoingTensor]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return [
        OutgoingTensor(name, names[array.dtype], array.shape, partial(in_blocks, array))
        for name, array in arrays.items()
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    write_tensor_file(path, outgoing(ARRAYS), {"format": "pt"})
    return path


def write_raw(path: Path, header, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(start: int, stop: int, shape=None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def test_round_trip(path):
    file = TensorFile(path)
    assert file.metadata == {"format": "pt"}
    assert file.tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert file.read(name).dtype == array.dtype
        np.testing.assert_array_equal(file.read(name), array)
        file.release(name)
        np.testing.assert_array_equal(file.read(name), array)


def test_the_reference_library_reads_what_is_written(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = {name: array for name, array in ARRAYS.items() if array.dtype != DTYPES["BF16"]}  # numpy has no such type
    write_tensor_file(tmp_path / "x.safetensors", outgoing(arrays), {"format": "pt"})
    given = numpy.load_file(tmp_path / "x.safetensors")
    assert given.keys() == arrays.keys()
    for name, array in arrays.items():
        assert given[name].shape == array.shape
        np.testing.assert_array_equal(given[name], array)


def test_what_the_reference_library_writes_is_read(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({name: ARRAYS[name] for name in ("a", "half")}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(file.read("a"), ARRAYS["a"])


def test_blocks_are_the_array(monkeypatch):
    monkeypatch.setattr(safetensors, "_BLOCK_BYTES", 10)
    array = np.arange(60, dtype=np.float32).reshape(5, 4, 3).transpose(2, 0, 1)
    blocks = list(in_blocks(array, DTYPES["BF16"]))
    assert len(blocks) == 3
    np.testing.assert_array_equal(np.concatenate(blocks), array.astype(ml_dtypes.bfloat16))


HOSTILE = {
    "empty file": lambda path: path.write_bytes(b""),
    "no whole length": lambda path: path.write_bytes(b"\1\0\0"),
    "header beyond the end": lambda path: write_raw(path, {}, length=1000),
    "huge header": lambda path: write_raw(path, {}, length=2**62),
    "not JSON": lambda path: write_raw(path, b"{]"),
    "not UTF-8": lambda path: write_raw(path, b'{"\xff": 1}'),
    "not an object": lambda path: write_raw(path, [1]),
    "deep nesting": lambda path: write_raw(path, b"[" * 100_000),
    "metadata of numbers": lambda path: write_raw(path, {"__metadata__": {"a": 1}}),
    "a name twice": lambda path: write_raw(path, b'{"a": {}, "a": {}}'),
    "an entry that is none": lambda path: write_raw(path, {"a": 3}),
    "no offsets": lambda path: write_raw(path, {"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "three offsets": lambda path: write_raw(path, {"a": entry(0, 4) | {"data_offsets": [0, 4, 4]}}, bytes(4)),
    "negative offset": lambda path: write_raw(path, {"a": entry(-4, 0)}, bytes(4)),
    "negative shape": lambda path: write_raw(path, {"a": entry(0, 4, [-1, -1])}, bytes(4)),
    "shape of fractions": lambda path: write_raw(path, {"a": entry(0, 4, [1.0])}, bytes(4)),
    "shape of truth values": lambda path: write_raw(path, {"a": entry(0, 4, [True])}, bytes(4)),
    "shape too large": lambda path: write_raw(path, {"a": entry(0, 4, [2])}, bytes(4)),
    "shape that overflows": lambda path: write_raw(path, {"a": entry(0, 4, [2**32, 2**32])}, bytes(4)),
    "shape of many axes": lambda path: write_raw(path, {"a": entry(0, 4, [10**4000] * 2000)}, bytes(4)),
    "shape of huge axes": lambda path: write_raw(path, {"a": entry(0, 4, [10**4000] * 8)}, bytes(4)),
    "shape of many ones": lambda path: write_raw(path, {"a": entry(0, 4, [1] * 9)}, bytes(4)),
    "huge offsets": lambda path: write_raw(path, {"a": entry(10**4000, 10**4000 + 4, [1])}, bytes(4)),
    "a number of too many digits": lambda path: write_raw(path, b'{"a": [%s]}' % (b"9" * 5000)),
    "a long name": lambda path: write_raw(path, {"a" * 5000: entry(0, 4, [2])}, bytes(4)),
    "a long dtype": lambda path: write_raw(path, {"a": entry(0, 4, [1], "F" * 5000)}, bytes(4)),
    "offsets swapped": lambda path: write_raw(path, {"a": entry(4, 0, [1])}, bytes(4)),
    "beyond the end": lambda path: write_raw(path, {"a": entry(0, 8)}, bytes(4)),
    "overlap": lambda path: write_raw(path, {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "gap": lambda path: write_raw(path, {"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "bytes left over": lambda path: write_raw(path, {"a": entry(0, 4)}, bytes(12)),
    "integers": lambda path: write_raw(path, {"a": entry(0, 4, [4], "U8")}, bytes(4)),
    "float64": lambda path: write_raw(path, {"a": entry(0, 8, [1], "F64")}, bytes(8)),
    "a folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_file_is_refused_in_one_sentence(fault, tmp_path):
    path = tmp_path / "x.safetensors"
    HOSTILE[fault](path)
    with pytest.raises(InputError) as error:
        TensorFile(path)
    message = str(error.value)
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 400


def test_every_truncation_is_noticed(path):
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError):
            TensorFile(path)


def test_an_existing_file_is_not_overwritten(path):
    with pytest.raises(FileExistsError):
        write_tensor_file(path, [], {})
