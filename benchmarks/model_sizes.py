"""Parameters and arithmetic of the official sizes, as docs/model_sizes.md.

  python benchmarks/model_sizes.py

Nothing is measured: the models are built abstractly and counted. tests/test_counts.py compares the counts with the
reference's own.
"""

from pathlib import Path

from gemma4_jax.counts import PARTS, count_active_parameters, count_parameters, flops_per_token
from gemma4_jax.sizes import SIZES

OFFICIAL = {"e2b": "E2B", "e4b": "E4B", "26b_a4b": "26B-A4B", "31b": "31B"}
LENGTHS = {"weights alone": 0, "with attention, 4,096 tokens": 4096, "with attention, 131,072 tokens": 131072}
PAGE = Path(__file__).parents[1] / "docs" / "model_sizes.md"

TEXT = """# How large the four sizes are

Written by `benchmarks/model_sizes.py`. Parameters are exactly those of the reference implementation; layer scalars,
clip bounds and other buffers are not counted, and the head is the token embedding. Active parameters are those that
work on a token of text: 8 of 128 experts, and no tower. Operations are those of a forward pass, a multiply-add counted
as two.

"""


def row(label: str, values: list[str]) -> str:
    """A line of the table."""
    return f"| {label} | {' | '.join(values)} |\n"


def main() -> None:
    """Writes the page and prints it."""
    configs = [SIZES[size]() for size in OFFICIAL]
    counts = [count_parameters(config) for config in configs]
    page = TEXT + row("", list(OFFICIAL.values())) + row("---", ["---:"] * len(OFFICIAL))
    for part in PARTS:
        page += row(part, [f"{count[part]:,}" if count[part] else "" for count in counts])
    page += row("**all parameters**", [f"{sum(count.values()):,}" for count in counts])
    page += row("**active parameters**", [f"{count_active_parameters(config):,}" for config in configs])
    for label, length in LENGTHS.items():
        flops = [flops_per_token(config, length) for config in configs]
        page += row(f"GFLOP a token, {label}", [f"{value / 1e9:.2f}" for value in flops])
        page += row("the same, relative to 31B", [f"{value / flops[-1]:.3f}" for value in flops])
    PAGE.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
