"""Every model of the zoo under PipeFusion on two processes: each call is the model's, displaced ones too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xdit_ir import models

Pools = Callable[[int], Any]

# What every rank refuses, with the same words; what else is refused is in the table of tests/parity.
REFUSED = {
    "cosmos3-omni": "output is not divided",
    "kandinsky-2.2-prior": "output is not divided",
    "lumina-2": "stale rows",
    "minimax-h3": "output is not divided",
    "nucleus-image": "stale rows",
    "qwen-image-2.1": "output is not divided",
    "wan-animate-2-reference": "forward writes into what it is given",
    "z-image-omni": "stale rows",
}
