"""Bytes that a compiled program sends, by kind of collective, read from its text."""

import math
import re
from collections import Counter

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}

# What a device sends, for each byte of the larger of operand and result, in a group of n.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%\S+ = (.+?) ([a-z][a-z\-]*)\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


def sent_bytes(program: str) -> Counter[str]:
    """Kind of collective -> bytes that a device sends while the program runs once.

    Loops count as often as they run, where their condition compares with a constant, and else once: that is the loop
    of experts over a device's choices, which as a rule goes round once. What a TPU calls an all-reduce of which
    each device keeps a part, fused, is a reduce-scatter.

    Args:
      program: `jax.stages.Compiled.as_text()`.
    """
    bodies = dict(re.findall(r"^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL))
    known: dict[str, Counter[str]] = {}

    def of_computation(name: str) -> Counter[str]:
        if name not in known:
            known[name] = Counter()
            for shape, operation, rest in _INSTRUCTION.findall(bodies[name]):
                known[name].update(of_instruction(name, shape, operation, rest))
        return known[name]

    def of_instruction(where: str, shape: str, operation: str, rest: str) -> Counter[str]:
        if operation.removesuffix("-start") in SENT:
            kind, n = operation.removesuffix("-start"), _group_size(rest)
            # What is only started names its operands beside its results.
            sizes = _sizes(shape)
            size = max(sizes) if operation.endswith("-start") else sum(sizes)
            if kind == "reduce-scatter":
                size *= n
            elif kind == "all-reduce" and "reduce-scatter" in where:
                kind = "reduce-scatter"
            return Counter({kind: round(size * SENT[kind](n))})
        if operation == "while":
            condition, body = re.search(r"condition=%([^,\s]+), body=%([^,\s]+)", rest).groups()
            trips = max(map(int, re.findall(r"[su]32\[\]\S* constant\((\d+)\)", bodies[condition])), default=1)
            return Counter({kind: trips * size for kind, size in of_computation(body).items()})
        total: Counter[str] = Counter()
        for called in re.findall(r"(?:calls|to_apply)=%([^,\s]+)", rest):
            total.update(of_computation(called))
        return total

    entry = re.search(r"^ENTRY %(\S+) ", program, re.MULTILINE)[1]
    return of_computation(entry)


def _sizes(shape: str) -> list[int]:
    """Bytes of the arrays of a shape, which may be a tuple."""
    return [
        BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape))
    ]


def _group_size(rest: str) -> int:
    """Devices of a group, in any of the forms in which groups are written."""
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if shaped := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(shaped[2])
    return 2  # a permutation names pairs
