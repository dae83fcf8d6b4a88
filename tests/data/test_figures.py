import pytest

from gemma4_jax.data.figures import counted, duration, memory, number


def test_one_is_not_many():
    assert [counted(n, "document") for n in (0, 1, 2, 1200)] == [
        "0 documents",
        "1 document",
        "2 documents",
        "1,200 documents",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2123, "0.21 s"), (9.999, "10.0 s"), (59.96, "1 min 0 s"), (163.1, "2 min 43 s"), (11_100, "3 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(900, "0.9 KiB"), (1_083_101_184, "1.0 GiB"), (2**30 - 1, "1.0 GiB"), (2**52, "4,096.0 TiB")],
)
def test_memory(num_bytes, text):
    assert memory(num_bytes) == text


def test_numbers_have_four_figures():
    assert [number(x) for x in (660_272, 2.12894, 1234.5, 1e-7, 0.0)] == ["660,272", "2.129", "1,234", "1e-07", "0"]
