"""Where in the model's own source the tracer stands."""

from __future__ import annotations

import dis
import linecache
import os
import sys
from functools import lru_cache

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_ROOT = os.path.dirname(os.path.dirname(__file__))
_OURS = tuple(os.path.join(_ROOT, room) + os.sep for room in ("capture", "reflection"))
_SKIP = (_TORCH, *_OURS)
_BETWEEN = (*_OURS, *(_TORCH + name for name in ("_dynamo" + os.sep, "_compile.py", "overrides.py", "_ops.py")))


def is_between(filename: str) -> bool:
    """Whether a file is one of those that stand between an operator and its caller: the tracer's, the dispatcher's."""
    return filename.startswith((*_BETWEEN, "<"))


def is_torch(filename: str) -> bool:
    """Whether a file is one of PyTorch's."""
    return filename.startswith(_TORCH)


@lru_cache(maxsize=4096)
def _foreign(filename: str) -> bool:
    return filename.startswith(_SKIP) or filename.startswith("<")


@lru_cache(maxsize=4096)
def _describe(filename: str, line: int) -> str:
    return f"{os.path.basename(filename)}:{line}: {linecache.getline(filename, line).strip()}"


def source_line() -> str:
    """The innermost line on the stack that is neither torch's nor ours: `model.py:413: x = gate * x`."""
    frame = sys._getframe(1)
    while frame is not None:
        if not _foreign(frame.f_code.co_filename):
            return _describe(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def is_raised_outside(error: BaseException) -> bool:
    """Whether code that is neither torch's nor ours raised an error: by a `raise`, looking up a name or an entry,
    dividing, or asking None for an attribute."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or traceback.tb_frame.f_code.co_filename.startswith(_SKIP):
        return False
    raises = traceback.tb_frame.f_code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    of_none = isinstance(error, AttributeError) and error.obj is None
    return raises or of_none or isinstance(error, (LookupError, ArithmeticError, NameError))


def failing_line(error: BaseException) -> str:
    """The innermost line of an error's traceback that is neither torch's nor ours."""
    found = ""
    traceback = error.__traceback__
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if not _foreign(filename):
            found = _describe(filename, traceback.tb_lineno)
        traceback = traceback.tb_next
    return found
