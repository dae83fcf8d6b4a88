"""Writing files that are never seen half-written."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that at any time there is the old one, or the new one, whole.

    Raises:
      OSError: it cannot be written; the old one, if there is one, stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
