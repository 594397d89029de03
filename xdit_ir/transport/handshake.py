"""The handshake before a forward: all ranks make the same call, or all of them raise."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from xdit_ir.capture.inputs import bind_arguments, flatten_named
from xdit_ir.errors import MismatchError
from xdit_ir.ir.program import Program, TensorSpec
from xdit_ir.transport.distributed import Communicator

Facts = Mapping[str, str]
ARGUMENTS, TRACE = "the arguments of forward", "the trace"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def agree(communicator: Communicator, mine: int, details: Callable[[], Facts], *, later: bool = False) -> None:
    """Return once every rank has called this with the same number (a `digest` of what it is about to do).

    `details` are asked for only where the numbers differ, to say how. Never waits for the device. With `later`, waits
    for nobody: the numbers are compared when this is called again.

    Raises:
        MismatchError: on every rank, if some rank differs: names the fact, this rank's value and the other's.
    """
    if communicator.control is None:
        return
    pending, communicator.vote = communicator.vote, None
    if pending is not None:
        _settle(communicator, *pending)
    votes = torch.tensor([mine, -mine])
    try:
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, group=communicator.control, async_op=True)
    except RuntimeError as error:
        raise _stopped(error) from error
    if later:
        communicator.vote = votes, work, details
    else:
        _settle(communicator, votes, work, details)


def _settle(communicator: Communicator, votes: torch.Tensor, work: Any, details: Callable[[], Facts]) -> None:
    try:
        work.wait()
        highest, lowest = votes.tolist()
        if highest == -lowest:
            return
        everyone: list[Any] = [None] * communicator.mesh.world_size
        dist.all_gather_object(everyone, dict(details()), group=communicator.control)
    except RuntimeError as error:
        raise _stopped(error) from error
    raise MismatchError(_difference(communicator.rank, everyone))


def _stopped(error: Exception) -> MismatchError:
    return MismatchError(f"another rank stopped instead of making the same call: {error}")


def agree_contents(communicator: Communicator, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make sure that all ranks hold the same numbers, up to rounding. Waits for the device.

    Compares a few projections of each tensor (on cosines of incommensurable frequencies) relative to its norm.

    Raises:
        MismatchError: on every rank, e.g. if noise was drawn from another seed somewhere.
    """
    if communicator.control is None or not tensors:
        return
    mine = torch.stack([_projections(tensor) for tensor in tensors.values()])
    everyone = [torch.empty_like(mine) for _ in range(communicator.mesh.world_size)]
    dist.all_gather(everyone, mine, group=communicator.control)
    for other, theirs in enumerate(everyone):
        distance = (theirs - everyone[0]).abs().amax(1)
        for name, apart, norm in zip(tensors, distance.tolist(), everyone[0][:, 0].tolist(), strict=True):
            if apart > 0.1 * norm:
                raise MismatchError(
                    f"{name}: rank {other} holds other numbers than rank 0; every process needs the same "
                    "inputs, so give all of them the same seed or generator"
                )


def _projections(tensor: torch.Tensor) -> torch.Tensor:
    """Norm and projections, `[1 + 8]` on the CPU."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    flat = real.detach().flatten().float().nan_to_num()
    places = torch.arange(flat.numel(), dtype=torch.float32, device=flat.device)
    waves = (torch.dot(flat, torch.cos(places * index**0.5)) for index in range(8))
    return torch.stack([flat.norm(), *waves]).cpu()


def digest(facts: Facts) -> int:
    """62 bits that two different sets of facts do not share."""
    hashed = hashlib.blake2b(digest_size=8)
    for name, fact in facts.items():
        hashed.update(f"{name}\0{fact}\0".encode())
    return int.from_bytes(hashed.digest(), "little") >> 2


def _difference(rank: int, everyone: Sequence[Facts]) -> str:
    mine = everyone[rank]
    for other, theirs in enumerate(everyone):
        for name in sorted({**mine, **theirs}, key=_urgency):
            have, has = mine.get(name, "nothing"), theirs.get(name, "nothing")
            if have != has:
                return f"the ranks' calls differ in {name}: rank {rank} (this one) has {have}, rank {other} has {has}"
    return "the ranks' calls differ, in something that neither their arguments nor their programs show"


def _urgency(name: str) -> int:
    """Failures first, then arguments, then what follows from them."""
    return 0 if name in (ARGUMENTS, TRACE) else 2 if name.startswith("the ") else 1


def call_facts(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any], contents: frozenset[str]
) -> dict[str, str]:
    """A call, leaf by leaf: shape and dtype of tensors (contents too for those named), value of the rest."""
    try:
        leaves, spec = flatten_named(bind_arguments(signature, args, kwargs, MismatchError))
    except MismatchError as error:
        return {ARGUMENTS: failure_text(error)}
    facts = {ARGUMENTS: "accepted"} | {path: fact(leaf) for path, leaf in leaves}
    for path, leaf in leaves:
        if path in contents and isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
            facts[path] += f" with contents {contents_hash(leaf)}"
    return facts | {"the structure of the arguments": _ADDRESS.sub("", repr(spec))}


def call_tensors(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors among a call's arguments, by path; none if forward does not take such arguments."""
    try:
        leaves, _ = flatten_named(bind_arguments(signature, args, kwargs, MismatchError))
    except MismatchError:
        return {}
    return {path: leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_meta}


def guarded(programs: Iterable[Program]) -> frozenset[str]:
    """Paths of the inputs whose contents some program was made for."""
    return frozenset(guard.path for program in programs for guard in program.signature.guards)


def fact(leaf: Any) -> str:
    """A text that is the same in every process for equal leaves."""
    if isinstance(leaf, (torch.Tensor, TensorSpec)):
        absent = " on the meta device" if isinstance(leaf, torch.Tensor) and leaf.is_meta else ""
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}{absent}"
    return _ADDRESS.sub("", repr(leaf))


def contents_hash(tensor: torch.Tensor) -> str:
    """A short hash of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().resolve_conj().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=4).hexdigest()


def failure_text(error: BaseException) -> str:
    """An error as one fact."""
    return f"{type(error).__name__}: {error}"
