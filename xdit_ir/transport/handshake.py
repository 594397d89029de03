"""The handshake before a forward: all ranks make the same call with the same inputs, or all of them raise."""

from __future__ import annotations

import hashlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from xdit_ir.capture.inputs import bind_arguments, flatten_named
from xdit_ir.errors import MismatchError
from xdit_ir.ir.program import Program, TensorSpec
from xdit_ir.transport.contents import Contents, Seen
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.line import Line

Facts = Mapping[str, str]
ARGUMENTS, TRACE, WEIGHTS = "the arguments of forward", "the trace", "the weights"
ROUNDED = "ranks differ by what compiled kernels round, and by what follows from it"
SOON = 2.0  # seconds in which what devices compute of inputs is to be there, where calls differ
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def agree(
    communicator: Communicator,
    mine: int,
    details: Callable[[], Facts],
    *,
    later: bool = False,
    contents: Contents | None = None,
    new: bool = False,
) -> bool:
    """Return once every rank has called this with the same number (a `digest` of what it is about to do).

    `details` are asked for only where the numbers differ, to say how. Never waits for what the device does now: the
    `contents` of inputs are compared here if they are known, otherwise when this is called again. With `later`, waits
    for nobody: everything is compared when this is called again.

    Returns:
        Whether weights are to be compared, because they are `new` to some rank.

    Raises:
        MismatchError: on every rank, if some rank differs: names the fact, this rank's value and the other's.
    """
    line = communicator.line
    if line is None:
        return False
    line.settle()
    number = line.count()
    known = contents.numbers() if contents is not None and contents.ready else None
    line.say(("call", number), {"is": str(mine), "later": later, "holds": known, "new": new})

    def compare() -> bool:
        votes = line.ask(("call", number), communicator.timeout)
        _compare_calls(line, number, votes, details, contents, communicator)
        if contents is not None and known is not None:
            _compare_contents(line, contents, [vote["holds"] for vote in votes], agreed=not later)
        return any(vote["new"] for vote in votes)

    found = False
    if later:
        line.put_off(number + 1, compare)
    else:
        found = compare()
    if contents is not None and known is None:
        compare_later(communicator, contents, what="inputs", calls=1)
    return found


def compare_later(communicator: Communicator, contents: Contents, *, what: str, calls: int) -> None:
    """Compare what is told of the latest call after so many `calls`, or sooner if all ranks have told it."""
    line = communicator.line
    if line is None:
        return
    number = line.calls
    topic, told = (what, number), contents.ready
    if told:
        line.say(topic, contents.numbers())

    def compare() -> None:
        if not told:
            line.say(topic, contents.numbers())
        elif line.calls + 1 < number + calls and not line.has(topic):
            line.put_off(number + calls, compare)
            return
        _compare_contents(line, contents, line.ask(topic, communicator.timeout), agreed=False)

    line.put_off(number + (1 if told else calls), compare)


def agree_contents(
    communicator: Communicator, tensors: Mapping[str, torch.Tensor], seen: dict[str, Seen] | None = None
) -> None:
    """Make sure that all ranks hold the same numbers under each name that they share. Waits for the device; of those
    that were `seen` before nothing is computed again.

    Raises:
        MismatchError: on every rank, e.g. if noise was drawn from another seed somewhere.
    """
    line = communicator.line
    if line is None:
        return
    contents = Contents(tensors, seen)
    everyone = line.exchange(("contents", line.count()), contents.numbers(), communicator.timeout)
    _compare_contents(line, contents, everyone, agreed=True)


def _compare_calls(
    line: Line,
    number: int,
    votes: Sequence[Any],
    details: Callable[[], Facts],
    contents: Contents | None,
    communicator: Communicator,
) -> None:
    alike = len({vote["is"] for vote in votes}) == 1
    waited = not any(vote["later"] for vote in votes)
    if alike and (waited or not any(vote["new"] for vote in votes)):
        return
    if not waited:  # who did not wait is at work already, and will not answer
        raise MismatchError(_out_of_step(line.rank, number, votes))
    told = dict(details()), None if contents is None else contents.soon(SOON)
    everyone = line.exchange(("details", number), told, communicator.timeout)
    facts, held = zip(*everyone, strict=True)
    raise line.agreed(MismatchError(_why(line.rank, facts, contents, held)))


def _why(rank: int, facts: Sequence[Facts], contents: Contents | None, held: Sequence[Any]) -> str:
    """How calls differ: in what was given, or else in what follows from it."""
    [name, text] = _difference(rank, facts)
    if _urgency(name) > 1 and contents is not None:
        return _other_contents(rank, contents, held) or text
    return text


def _out_of_step(rank: int, number: int, votes: Sequence[Any]) -> str:
    mine = votes[rank]
    for other, vote in enumerate(votes):
        if vote["is"] != mine["is"]:
            return (
                f"the ranks are out of step: call {number} is another one on rank {other} than on rank {rank} (this "
                "one): a rank has left out a call, or begins another request"
            )
    [first, *_] = [other for other, vote in enumerate(votes) if vote["new"]]
    return f"{WEIGHTS} of rank {first} changed during a request, those of other ranks did not"


def _compare_contents(line: Line, contents: Contents, everyone: Sequence[Any], *, agreed: bool) -> None:
    if not (text := _other_contents(line.rank, contents, everyone)):
        return
    if beyond := _other_contents(line.rank, contents, everyone, rounded=True):
        error = MismatchError(beyond)
        raise line.agreed(error) if agreed else error
    warnings.warn(f"{ROUNDED}: {text}", stacklevel=2)


def _other_contents(mine: int, contents: Contents, everyone: Sequence[Any], *, rounded: bool = False) -> str:
    """Which of these some ranks hold other numbers of; empty if none, or (`rounded`) if rounding explains it."""
    different = contents.difference([held or ((), ()) for held in everyone], rounded=rounded)
    if different is None:
        return ""
    name, other = different
    one, first = (f"rank {rank}{' (this one)' * (rank == mine)}" for rank in (other, 0))
    return (
        f"{name}: its contents differ: {one} holds other numbers than {first}; every process needs the same inputs and "
        "weights, so give all of them the same seed or generator, and the same checkpoint and adapters"
    )


def digest(facts: Facts) -> int:
    """62 bits that two different sets of facts do not share."""
    hashed = hashlib.blake2b(digest_size=8)
    for name, fact in facts.items():
        hashed.update(f"{name}\0{fact}\0".encode())
    return int.from_bytes(hashed.digest(), "little") >> 2


def _difference(rank: int, everyone: Sequence[Facts]) -> tuple[str, str]:
    """The fact in which the ranks differ, and how."""
    mine = everyone[rank]
    for other, theirs in enumerate(everyone):
        for name in sorted({**mine, **theirs}, key=_urgency):
            have, has = mine.get(name, "nothing"), theirs.get(name, "nothing")
            if have != has:
                text = f"the ranks' calls differ in {name}: rank {rank} (this one) has {have}, rank {other} has {has}"
                return name, text
    return WEIGHTS, "the ranks' calls differ, in something that neither their arguments nor their programs show"


def _urgency(name: str) -> int:
    """Failures first, then arguments, then what follows from them."""
    if name == WEIGHTS:
        return 3
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
    """The tensors with contents to compare among a call's arguments, by path; none if forward does not take such."""
    try:
        leaves, _ = flatten_named(bind_arguments(signature, args, kwargs, MismatchError))
    except MismatchError:
        return {}
    return {path: leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor) and is_dense(leaf)}


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor has its elements in memory, one by one."""
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)


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
