"""Makes the helpers of this folder importable (pytest runs in `importlib` mode, which leaves sys.path alone)."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)
