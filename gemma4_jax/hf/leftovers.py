"""Names for what is on its way to its place, and the removal of what killed processes left under such names."""

import contextlib
import os
import re
import shutil
import socket
from pathlib import Path

HOST = re.sub(r"[^\w-]", "_", socket.gethostname())
"""This machine in such names: of the processes of others on a shared disk nobody here knows whether they live."""


def beside(path: Path, ending: str) -> Path:
    """A hidden path in the same folder that tells whose it is; `ending` is one that `remove_leftovers` knows."""
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}.{ending}")


def remove_leftovers(out_dir: Path) -> None:
    """Removes the unfinished folders and files of dead processes of this machine beside an output folder.

    An earlier export that one of them had moved aside goes back to its place, if nothing else is there.

    Args:
      out_dir: the folder that is about to be made.
    """
    out_dir = out_dir.absolute()
    owner = rf"\.{re.escape(HOST)}\.(\d{{1,9}})\."
    name = rf"\.{{1,2}}{re.escape(out_dir.name)}{owner}(tmp|old|carried\.safetensors({owner}tmp)?)"
    with contextlib.suppress(OSError):  # then what is made next says what is wrong with the place
        for path in out_dir.parent.iterdir():
            left = re.fullmatch(name, path.name)
            if left is None or _is_alive(int(left[1])):
                continue
            if left[2] == "old" and not out_dir.exists():
                path.rename(out_dir)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True
