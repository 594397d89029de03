"""A folder of files that processes leave for each other, of bounded size: those go that were used the longest ago."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

LIMIT = 2**30
"""Bytes of all files in a folder and its folders."""


def used(*paths: Path) -> None:
    """Note that files are of use; what another process has deleted meanwhile is none."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.utime(path)


def write(path: Path, data: bytes) -> None:
    """At once, as other processes may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


def trim(folder: Path, limit: int = LIMIT) -> None:
    """Delete files, those first that were used the longest ago, until all have no more bytes than that; and folders
    that have none left. Other processes may do the same."""
    found = []
    for path in (Path(home, name) for home, _, names in os.walk(folder) for name in names):
        with contextlib.suppress(OSError):
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    over = sum(size for _, size, _ in found) - limit
    for _, size, path in sorted(found):
        if over <= 0:
            return
        over -= size
        with contextlib.suppress(OSError):
            path.unlink()
            path.parent.rmdir()
