"""An operator that exchanges at once, for compiled code; importing registers it.

PyTorch's functional collective is two operators, each behind a function of Python for gradients, and runs on another
stream than the code around it. This is one, and calls the process group. A compiler keeps it as it is, but knows no
order of such calls, which must be the same on all ranks: so each takes what the one before gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d

_LIBRARY: Any = torch.library.Library("xdit_ir", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("exchange(Tensor x, Tensor[] after, SymInt[] coming, SymInt[] leaving, str group) -> Tensor")
_RESOLVE: Any = c10d._resolve_process_group
_OPTIONS = c10d.AllToAllOptions()
_OPTIONS.asyncOp = False


def _exchange(
    x: torch.Tensor, after: Sequence[torch.Tensor], coming: list[int], leaving: list[int], group: str
) -> torch.Tensor:
    """`x [elements]`, of which `leaving` go to each member -> what comes from all, of `coming` elements."""
    room = x.new_empty(sum(coming))
    work = _RESOLVE(group).alltoall_base(room, x, coming, leaving, _OPTIONS)
    if work is not None:  # the backends of CPUs go on by themselves
        work.wait()
    return room


def _typed(
    x: torch.Tensor, after: Sequence[torch.Tensor], coming: Sequence[int], leaving: Sequence[int], group: str
) -> torch.Tensor:
    return x.new_empty(sum(coming))


_LIBRARY.impl("exchange", _exchange, "CompositeExplicitAutograd")
torch.library.register_fake("xdit_ir::exchange", _typed, lib=_LIBRARY)
