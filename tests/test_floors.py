"""The rooms of the package stand on floors, and each imports from floors below its own, or from itself."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

FLOORS = [
    ("launch",),
    ("train",),
    ("hf",),
    ("checkpoints",),
    ("generation",),
    ("data",),
    ("counts",),
    ("model",),
    ("text", "vision", "audio"),
    ("layers", "stack"),
    ("ops",),
    ("sharding", "rope", "processes"),
    ("chat",),
    ("tokenizer", "sandbox"),
    ("configs",),
    ("run_config",),
    ("batch", "files", "vision.geometry", "audio.features"),
    ("sizes",),
    ("config",),
    ("fields",),
    ("errors",),
]
"""Rooms by floor, from the top; modules of the package by what follows its name."""


def floor_of(module: str) -> tuple[int, str]:
    """(floor, room) of a module of the package, named without the package: of the smallest room that it is in."""
    rooms = [(room, floor) for floor, names in enumerate(FLOORS) for room in names]
    inside = [(room, floor) for room, floor in rooms if f"{module}.".startswith(f"{room}.")]
    assert inside, f"{module} stands on no floor: add it to FLOORS"
    room, floor = max(inside, key=lambda found: len(found[0]))
    return floor, room


def modules() -> dict[str, Path]:
    """Module, named without the package -> its file."""
    found = {}
    for folder in ("gemma4_jax", "data", "train", "configs", "launch"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file.parent.name == "bundled":
                continue  # scripts that make what is shipped
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if parts[0] == "gemma4_jax" else parts
            found[".".join(parts).removesuffix("__init__").rstrip(".")] = file
    return found


def imported(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, wherever in it; not those that only a type checker imports."""
    tree = ast.parse(file.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    inside = {name.removeprefix("gemma4_jax").lstrip(".") for name in names if name.split(".")[0] == "gemma4_jax"}
    return inside & known.keys()


def test_every_room_imports_from_below():
    known, wrong = modules(), []
    del known[""]  # the package itself offers what is in its rooms
    for module, file in known.items():
        here = floor_of(module)
        for other in imported(file, known):
            there = floor_of(other)
            if here[1] != there[1] and here[0] >= there[0]:
                wrong.append(f"{module} imports {other}")
    assert wrong == []
