"""What a rank does at a communication: small modules without parameters, made of functional collectives.

`torch.ops._c10d_functional` is what `torch.distributed._functional_collectives` lowers to; called directly, it is
traced by torch.compile just so and spares the eager path a tensor subclass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed._functional_collectives

from xdit_ir.ir.collective_ops import (
    AllGather,
    Assembly,
    Communicate,
    PlainAssembly,
    Reduce,
    ReduceScatter,
    Reshuffle,
    Ring,
    Takes,
    Together,
    add_up,
    cut,
    join,
    takes_of,
)
from xdit_ir.ir.fixed_call import FixedCall
from xdit_ir.ir.relayout import RankExchange
from xdit_ir.kernels.attention import RingMerge
from xdit_ir.kernels.backends import BACKENDS
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.packing import (
    Packing,
    Rows,
    Shapes,
    coming_sizes,
    message_of,
    results_of_messages,
    tables_of,
)
from xdit_ir.transport.wire import (
    apart,
    begin,
    begin_gather,
    begin_sum,
    begin_tables,
    finish,
    on_wire,
    start,
    typed,
    wait,
)

Tensors = Sequence[torch.Tensor]


def lower(target: Communicate, communicator: Communicator, *, at_once: bool = False) -> tuple[Exchange, ...]:
    """The modules that execute a communication on this process's rank; its process group exists already.

    One that does all of it, or one that starts it and one that, given what the first returned, waits for it. The first
    one can be told what it comes `after`: what others have given before, of several values the first. `at_once`:
    nothing is done meanwhile; only for `can_be_at_once`.
    """
    modules = _lowered(target, communicator, at_once)
    for module in modules:
        module.by_host = not communicator.recordable
    return modules


def can_be_at_once(target: object) -> bool:
    """Whether a communication is an all-to-all of its own."""
    return type(target) in (Reshuffle, Together)


class Exchange(FixedCall):
    """A communication or a half of one; `by_host`: the host takes part in it, so no CUDA graph can hold it.

    A second half takes as many values as the first one gives: `handed`, or all in one if that is None.
    """

    by_host = False
    handed: int | None = 2


def _lowered(target: Communicate, communicator: Communicator, at_once: bool) -> tuple[Exchange, ...]:
    at, beside = target.group.index(communicator.rank), isinstance(target, AllGather)
    name = communicator.among(target.group, beside=beside).group_name if len(target.group) > 1 else ""
    if isinstance(target, Reduce):
        return (AllReduce(name),)
    if isinstance(target, ReduceScatter):
        shapes = target.exchange.shapes
        return Send(target.exchange, at, shapes, name, direct=True), AddUp(shapes)
    if isinstance(target, Together):
        packing = Packing.of(target.exchanges, at)
        return PackedSend(packing, name, at_once=at_once), PackedReceive(packing, at_once=at_once)
    if isinstance(target, Reshuffle) and not name:
        return (Rearrange(target),)
    if isinstance(target, AllGather):
        return SendParts(len(target.group), name), ReceiveParts(target.exchange.shape)
    if isinstance(target, Reshuffle):
        assembly = Assembly.of(target.exchange)
        direct = assembly.is_contiguous
        shapes = tuple(shape if direct or i != at else (0,) for i, shape in enumerate(target.exchange.shapes))
        return (
            Send(target.exchange, at, shapes, name, direct=direct, at_once=at_once),
            Receive(assembly, at, shapes, direct=direct, at_once=at_once),
        )
    assert isinstance(target, Ring)
    return (RingAttention(target, at, name),)


class AllReduce(Exchange):
    """The sum over a group: every element is summed once and then sent to all, so all ranks get equal bits."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.fixed = {"group": group}

    @staticmethod
    def function(x: torch.Tensor, *, group: str, after: Tensors = ()) -> torch.Tensor:
        """`x [...]` -> sum of the members' `x`, of the same shape."""
        if not group or not x.numel():
            return x
        real = torch.view_as_real(x) if x.is_complex() else x
        total = wait(begin_sum(real.contiguous(), group, after))
        return torch.view_as_complex(total) if x.is_complex() else total


class Rearrange(Exchange):
    """A change of layout without others: cut and put together anew."""

    def __init__(self, target: Reshuffle) -> None:
        super().__init__()
        self.fixed = {"takes": takes_of(target.exchange), "assembly": Assembly.of(target.exchange).plain}

    @staticmethod
    def function(x: torch.Tensor, *, takes: Takes, assembly: PlainAssembly) -> torch.Tensor:
        """`x`, the part in the old layout -> the part in the new one."""
        return join(cut(x, takes), *assembly)


class Send(Exchange):
    """The first half of a change of layout: start the all-to-all of pieces of static, uneven sizes.

    Pieces of `shapes` come from the members; `direct`: what arrives is the result as it lies in memory, so one's own
    piece travels too, which saves a copy.
    """

    def __init__(
        self, exchange: RankExchange, at: int, shapes: Shapes, group: str, *, direct: bool, at_once: bool = False
    ) -> None:
        super().__init__()
        self.fixed = {"takes": takes_of(exchange), "at": at, "shapes": shapes, "group": group, "direct": direct}
        self.fixed["at_once"] = at_once

    @staticmethod
    def function(
        x: torch.Tensor,
        *,
        takes: Takes,
        at: int,
        shapes: Shapes,
        group: str,
        direct: bool,
        at_once: bool,
        after: Tensors = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x`, this rank's part in the old layout -> what is on its way, and the piece that stays here."""
        pieces = cut(x, takes)
        own = x.new_empty(0)
        if not direct:
            own, pieces[at] = pieces[at], own
        return start(pieces, shapes, group, after, at_once=at_once), own


class Receive(Exchange):
    """The second half: wait for the pieces and put them together; `direct` as for `Send`."""

    def __init__(self, assembly: Assembly, at: int, shapes: Shapes, *, direct: bool, at_once: bool = False) -> None:
        super().__init__()
        self.fixed = {"assembly": assembly.plain, "at": at, "shapes": shapes, "direct": direct, "at_once": at_once}

    @staticmethod
    def function(
        pending: torch.Tensor,
        own: torch.Tensor,
        *,
        assembly: PlainAssembly,
        at: int,
        shapes: Shapes,
        direct: bool,
        at_once: bool,
    ) -> torch.Tensor:
        """What `Send` gave -> this rank's part in the new layout."""
        there = pending if at_once else wait(pending)
        if direct:
            return typed(there, assembly[0], own.dtype)
        pieces = apart(there, shapes, own.dtype)
        pieces[at] = own
        return join(pieces, *assembly)


class PackedSend(Exchange):
    """The first half of several changes of layout at once: start the one all-to-all."""

    def __init__(self, packing: Packing, group: str, *, at_once: bool = False) -> None:
        super().__init__()
        self.fixed = {"takes": packing.takes, "shapes": packing.shapes, "leaving": packing.leaving}
        self.fixed |= {"at_once": at_once}
        self.fixed |= {"chunked": packing.chunked, "at": packing.at, "direct": packing.direct, "group": group}

    @staticmethod
    def function(
        *xs: torch.Tensor,
        takes: tuple[Takes, ...],
        shapes: tuple[Shapes, ...],
        leaving: tuple[Rows, ...],
        chunked: bool,
        at: int,
        direct: bool,
        group: str,
        at_once: bool,
        after: Tensors = (),
    ) -> tuple[torch.Tensor, ...]:
        """This rank's parts in the old layouts -> what is on its way, and the pieces that stay here."""
        coming = coming_sizes(shapes)
        if chunked:
            return (begin_tables(tables_of(xs, leaving[0]), coming, group, after, at_once=at_once),)
        flat, sizes, own = message_of(xs, takes, leaving, at, direct)
        return begin(flat, coming, sizes, group, after, at_once=at_once), *own


class PackedReceive(Exchange):
    """The second half: wait for the messages and take them apart."""

    def __init__(self, packing: Packing, *, at_once: bool = False) -> None:
        super().__init__()
        self.handed = 1 if packing.direct else 1 + len(packing.takes)
        self.fixed = {"shapes": packing.shapes, "assemblies": packing.assemblies, "coming": packing.coming}
        self.fixed |= {"at": packing.at, "direct": packing.direct, "at_once": at_once}

    @staticmethod
    def function(
        pending: torch.Tensor,
        *own: torch.Tensor,
        shapes: tuple[Shapes, ...],
        assemblies: tuple[PlainAssembly, ...],
        coming: tuple[Rows, ...],
        at: int,
        direct: bool,
        at_once: bool,
    ) -> tuple[torch.Tensor, ...]:
        """What `PackedSend` gave -> this rank's parts in the new layouts."""
        there = pending if at_once else wait(pending)
        return tuple(results_of_messages(there, own, shapes, assemblies, coming, at, direct))


class SendParts(Exchange):
    """The first half of a gather of equal parts: start it."""

    def __init__(self, count: int, group: str) -> None:
        super().__init__()
        self.fixed = {"count": count, "group": group}

    @staticmethod
    def function(x: torch.Tensor, *, count: int, group: str, after: Tensors = ()) -> tuple[torch.Tensor, torch.Tensor]:
        """`x`, this rank's part -> all parts, which are on their way, and nothing of the type that they have."""
        return begin_gather(on_wire(x).contiguous(), count, group, after), x.new_empty(0)


class ReceiveParts(Exchange):
    """The second half: wait for the parts, which lie one behind the other."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.fixed = {"shape": shape}

    @staticmethod
    def function(pending: torch.Tensor, own: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
        """What `SendParts` gave -> the whole."""
        return typed(wait(pending), shape, own.dtype)


class AddUp(Exchange):
    """The second half of a reduce-scatter: wait for the summands of one's own part and add them up."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.fixed = {"shapes": shapes}

    @staticmethod
    def function(pending: torch.Tensor, own: torch.Tensor, *, shapes: Shapes) -> torch.Tensor:
        """What `Send` gave -> the sum, of the shape that all pieces have."""
        return add_up(finish(pending, shapes, own.dtype))


class RingAttention(Exchange):
    """Attention whose keys and values travel around the group, each hop under the previous block's computation."""

    def __init__(self, target: Ring, at: int, group: str) -> None:
        super().__init__()
        self.fixed = {"keys": target.keys, "kernels": target.kernels, "at": at, "group": group}

    @staticmethod
    def function(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
        *,
        keys: tuple[int, ...],
        kernels: tuple[str, ...],
        at: int,
        group: str,
        after: Tensors = (),
    ) -> torch.Tensor:
        """`q [..., queries, dim]`, `k`, `v` `[..., own keys, dim]`, `mask [..., all keys]` -> `[..., queries, dim_v]`.

        Members are visited in the order in which their keys arrive, so a rank's result is deterministic.
        """
        assert not is_causal, "causal attention is never lowered to a ring"
        merge = RingMerge(q, mask, scale, keys, enable_gqa=enable_gqa, kernels=[BACKENDS.get(name) for name in kernels])
        members = len(keys)
        for hop in range(members):
            member = (at - hop) % members
            if hop == members - 1:
                merge.add(member, k, v)
                break
            coming = keys[(member - 1) % members]
            shapes = _arriving(k, v, coming, at, members)
            pending = start(_leaving(k, v, at, members), shapes, group, () if hop else after)
            merge.add(member, k, v)
            both = finish(pending, shapes, k.dtype)[at - 1]
            shape, shape_v = _resized(k, coming), _resized(v, coming)
            k, v = both[: math.prod(shape)].view(shape), both[math.prod(shape) :].view(shape_v)
        return merge.result()


def _leaving(k: torch.Tensor, v: torch.Tensor, at: int, members: int) -> list[torch.Tensor]:
    """Per member what it gets: keys and values in one piece for the next one, nothing for the others."""
    pieces = [k.new_empty(0) for _ in range(members)]
    pieces[(at + 1) % members] = torch.cat([k.reshape(-1), v.reshape(-1)])
    return pieces


def _arriving(k: torch.Tensor, v: torch.Tensor, keys: int, at: int, members: int) -> Shapes:
    """Per member the size of what comes from it: `keys` keys and values from the previous one."""
    shapes = [(0,) for _ in range(members)]
    shapes[at - 1] = (math.prod(_resized(k, keys)) + math.prod(_resized(v, keys)),)
    return tuple(shapes)


def _resized(x: torch.Tensor, keys: int) -> tuple[int, ...]:
    return (*x.shape[:-2], keys, x.shape[-1])
