"""Why an attempt at capturing a model may fail, so that another one, which gives something up, may do."""

from __future__ import annotations

from xdit_ir.errors import TraceError

Spot = tuple[str, str]
"""What is called: the path of a module, and the name of its method."""


class Unshareable(Exception):
    """A block does something that a shared body cannot express."""


class RaisedByForward(TraceError):
    """Forward itself raised `error`, as it would without a trace."""

    def __init__(self, text: str, error: Exception) -> None:
        super().__init__(text)
        self.error = error


class Opaque(TraceError):
    """The module at `path` does what cannot be captured; called as a leaf it could run. `selects`: it selects rows by a
    mask, which may be captured otherwise, see `xdit_ir.capture.selections`."""

    def __init__(self, text: str, path: str, *, selects: bool = False) -> None:
        super().__init__(text)
        self.path, self.selects = path, selects


class Restart(BaseException):
    """The trace must begin anew, with some modules not taken as blocks.

    Not an `Exception`, so that handlers in the model's code do not swallow it.
    """

    def __init__(self, spot: Spot) -> None:
        super().__init__(*spot)
        self.path, self.spot = spot[0], spot


class Repeated(BaseException):
    """The trace must begin anew, with the calls of a method of a module as blocks.

    Not an `Exception`, as `Restart`.
    """

    def __init__(self, spot: Spot) -> None:
        super().__init__(*spot)
        self.spot = spot


class ShapeDepends(Exception):
    """What a module returns has another shape for other contents; the module at `path` cannot be a leaf."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path
