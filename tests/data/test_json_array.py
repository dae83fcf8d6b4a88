"""The elements of a JSON array are found by its brackets, in parts of any size."""

import io
import json
import random
import tracemalloc

import pytest

from gemma4_jax.data.sources import json_array


def elements(content):
    return [content[r.offset : r.offset + r.length] for r in json_array.find_elements(io.BytesIO(content))]


def value(rng, depth=0):
    kind = rng.randrange(6 if depth < 4 else 4)
    if kind == 5:
        return {str(value(rng, 9)): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    if kind == 4:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    text = "".join(rng.choice('ab"\\[]{},ä\n ') for _ in range(rng.randrange(12)))
    return [rng.randrange(100), None, text, text][kind]


@pytest.mark.parametrize("part_bytes", [1, 2, 3, 7, 2**20])
def test_random_arrays(part_bytes, monkeypatch):
    monkeypatch.setattr(json_array, "PART_BYTES", part_bytes)
    rng = random.Random(part_bytes)
    for _ in range(300):
        array = [value(rng) for _ in range(rng.randrange(5))]
        content = json.dumps(array, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])).encode()
        assert [json.loads(element) for element in elements(content)] == array


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[", "it does not end"),
        (b'["a', "it does not end"),
        (b"[{}", "it does not end"),
        (b"[" * 100_000, "it does not end"),
        (b"[{} {}]", "no comma before byte 4"),
        (b'["a" "b"]', "no comma before byte 5"),
        (b"[1,,2]", "nothing before byte 3"),
        (b"[1,]", "nothing before byte 3"),
        (b"[,]", "nothing before byte 1"),
        (b"[1}", "it is closed by '}'"),
        (b"[1] 2", "Extra data after the array"),
        (b"[1]]", "Extra data after the array"),
    ],
)
def test_what_is_no_array(content, message):
    with pytest.raises(ValueError, match=message):
        elements(content)


def test_what_is_wrong_inside_of_an_element_is_left_to_its_reader():
    assert elements(b'[{"a": }, nonsense, {"b": [1}}]') == [b'{"a": }', b" nonsense", b' {"b": [1}}']


def test_a_large_element_is_not_held(tmp_path):
    with (tmp_path / "a.json").open("w") as file:
        file.write('[{"text": "' + "x" * 30_000_000 + '"}, {"text": "two"}]')
    tracemalloc.start()
    with (tmp_path / "a.json").open("rb") as file:
        lengths = [record.length for record in json_array.find_elements(file)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lengths == [30_000_012, 16]
    assert peak < 3 * json_array.PART_BYTES
