"""How a workspace in symmetric memory is laid out; what writes there needs CUDA, this does not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

SLOTS = 3  # per channel
HEADER = 64  # bytes at the start of a workspace
SIGNALS = 512  # words of a signal pad for arrivals (one per channel, slot and member); as many follow for what was sent
PADS = 4  # times SIGNALS words are in a signal pad; the last quarter is for meetings


def read_letter(letter: torch.Tensor, place: int) -> tuple[int, int, int, Sequence[int]]:
    """What a letter (see `Mailbox.letter`) says of a place: the number of the flags that tell of it, a byte offset,
    what goes on behind it, and copies."""
    numbers = letter.tolist()
    channel, offset, behind, *plan = numbers[numbers[1 + 2 * place] : numbers[2 + 2 * place]]
    return SLOTS * channel + numbers[0], offset, behind, plan
