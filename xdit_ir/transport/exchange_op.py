"""Operators that exchange at once, for compiled code; importing registers them.

PyTorch's functional collective is two operators, each behind a function of Python for gradients, and runs on another
stream than the code around it. These are one, and call the process group. A compiler keeps them as they are, but knows
no order of such calls, which must be the same on all ranks: so each takes what the one before gave.

Tables are put together as messages outside of the compiled code: inside, the number of rows is a symbol, and a kernel
that writes messages in their order would divide by it for each element of each table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d

from xdit_ir.transport.packing import chunk_messages

_LIBRARY: Any = torch.library.Library("xdit_ir", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("exchange(Tensor x, Tensor[] after, SymInt[] coming, SymInt[] leaving, str group) -> Tensor")
_LIBRARY.define("exchange_tables(Tensor[] tables, Tensor[] after, SymInt[] coming, str group) -> Tensor")
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


def _exchange_tables(
    tables: Sequence[torch.Tensor], after: Sequence[torch.Tensor], coming: list[int], group: str
) -> torch.Tensor:
    """`tables`, each `[rows, columns]`, of whose columns each member gets an equal part -> as of `_exchange`."""
    messages = chunk_messages(tables, (0,) * len(tables), len(coming)).view(-1)
    return _exchange(messages, after, coming, [len(messages) // len(coming)] * len(coming), group)


def _typed_tables(
    tables: Sequence[torch.Tensor], after: Sequence[torch.Tensor], coming: Sequence[int], group: str
) -> torch.Tensor:
    return tables[0].new_empty(sum(coming))


_LIBRARY.impl("exchange", _exchange, "CompositeExplicitAutograd")
torch.library.register_fake("xdit_ir::exchange", _typed, lib=_LIBRARY)
_LIBRARY.impl("exchange_tables", _exchange_tables, "CompositeExplicitAutograd")
torch.library.register_fake("xdit_ir::exchange_tables", _typed_tables, lib=_LIBRARY)
