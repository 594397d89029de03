"""A further mesh dim is one line in one place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_one_line_makes_a_further_mesh_dim() -> None:
    """In a process of its own, since the table is read when modules are imported."""
    script = Path(__file__).with_name("further_dim.py")
    made = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=600)
    assert made.returncode == 0, made.stderr
