"""The one family of errors that users meet: what was wrong, what was expected, the nearest legal choice."""

from __future__ import annotations


class XditError(Exception):
    """Base of every error raised on purpose by xdit_ir."""


class TraceError(XditError):
    """A module could not be captured; names the input or the source line at fault."""


class StateError(TraceError):
    """Forward keeps a state between calls; names what it writes."""


class ParallelizeError(XditError):
    """A parallel degree is unknown or illegal for this program; names the nearest legal one. `patches` is that, where
    a number of patches was refused."""

    def __init__(self, reason: str, *, patches: int | None = None) -> None:
        super().__init__(reason)
        self.patches = patches


class PassError(XditError):
    """A pass cannot run yet; names what the program lacks and the passes that provide it."""


class VerifyError(XditError):
    """A program breaks an invariant of the IR; names the pass, block and node."""


class ExecutionError(XditError):
    """An operator of some rank's program cannot be run, as PyTorch says; a defect of a rule, a pass or a weight.

    `site` is the name of the block call (empty: outer graph) and `node` the operator's.
    """

    def __init__(self, rank: int, site: str, node: str, reason: str) -> None:
        super().__init__(f"rank {rank}, {site or 'outer graph'}, {node}: {reason}")
        self.rank, self.site, self.node, self.reason = rank, site, node, reason


class GenerationError(XditError):
    """A pipeline's folder, or what it shall generate, is not usable; names the file, argument or component."""


class ServingError(XditError):
    """A server cannot start, or go on, or answer a request; names the rank or the request."""


class GradientError(XditError):
    """A call of a parallel program needs gradients, of which it records none; names the input."""


class MismatchError(XditError):
    """Inputs, weights or ranks differ from what a program was made for; names the argument."""


class LostError(MismatchError):
    """Another rank failed, ended or stopped, so that a call cannot be finished; `rank` is that one, where it is known.

    Every rank raises it once for one failure. The next call begins anew, on all of them.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class ParseError(XditError):
    """A program's text cannot be read; names the line, what was expected and what stands there."""
