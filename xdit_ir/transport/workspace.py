"""How a workspace in symmetric memory is laid out; what writes there needs CUDA, this does not."""

from __future__ import annotations

SLOTS = 3  # per channel
HEADER = 64  # bytes at the start of a workspace
SIGNALS = 512  # words of a signal pad for arrivals (one per channel, slot and member); as many follow for what was sent
