"""Arguments of operators as text, and back: numbers, strings, dtypes, devices, tensors, nested as they come.

Python's own notation where there is one. Tuples and lists stay what they are; `$key` is an attachment.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from xdit_ir.errors import ParseError
from xdit_ir.ir.printer import DTYPES
from xdit_ir.text.attachments import INLINE, Collected, attached
from xdit_ir.text.scanner import Scanner
from xdit_ir.text.targets import RECORDS

BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
COMPLEX = r"\([^(), ]*j\)|-?[\d.]+(?:e[+-]?\d+)?j"
NUMBER = r"-?(?:inf|nan|\d+(?:\.\d*)?(?:e[+-]?\d+)?)(?![\w.])"
WORD = r"[A-Za-z_][\w.]*(?::\d+)?"
RECORD = r"[A-Z]\w*\{"
PLAIN = r"[\w.\-]+"
DEVICES = ("cpu", "cuda", "meta", "xpu", "mps", "hpu", "npu", "privateuseone")
Reader = Callable[[Scanner], Any]


def dtype_text(dtype: torch.dtype) -> str:
    """`f32`, or PyTorch's name where there is no short one."""
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def name_text(name: str) -> str:
    """A name, quoted where it is no plain one."""
    return name if Scanner(name).match(PLAIN) == name else repr(name)


def read_name(scanner: Scanner) -> str:
    """A plain or quoted name."""
    quoted = scanner.match(STRING)
    return scanner.expect(PLAIN, "a name") if quoted is None else str(ast.literal_eval(quoted))


class LiteralWriter:
    """Literals as text; `reference` prints nodes, what has no text is collected."""

    def __init__(self, collected: Collected, reference: Callable[[Any], str | None] = lambda item: None) -> None:
        self.collected, self.reference = collected, reference

    def __call__(self, value: Any) -> str:
        """The text of one value."""
        known = self.reference(value)
        if known is not None:
            return known
        if isinstance(value, dict) and type(value) is dict:
            return "{" + ", ".join(f"{self(key)}: {self(item)}" for key, item in value.items()) + "}"
        if type(value) is tuple:
            return f"({', '.join(map(self, value))}{',' if len(value) == 1 else ''})"
        if isinstance(value, list):
            return f"[{', '.join(map(self, value))}]"
        if isinstance(value, slice):
            return f"slice({self(value.start)}, {self(value.stop)}, {self(value.step)})"
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if RECORDS.get(type(value).__name__) is type(value):
            return self._record(value)
        return self._word(value)

    def _record(self, value: Any) -> str:
        given = (f"{one.name}: {self(getattr(value, one.name))}" for one in dataclasses.fields(value))
        return f"{type(value).__name__}{{{', '.join(given)}}}"

    def _word(self, value: Any) -> str:
        if value is Ellipsis:
            return "..."
        if value is None or type(value) in (bool, int, float, complex, str):
            return repr(value)
        if isinstance(value, torch.dtype):
            return dtype_text(value)
        if isinstance(value, torch.device) and value.type in DEVICES:
            return str(value)
        if isinstance(value, (torch.layout, torch.memory_format)):
            return str(value)
        return f"${name_text(self.collected.object(value))}"

    def tensor(self, value: torch.Tensor) -> str:
        """`i64[3] [0, 1, 2]` with all elements, or with the hash of the contents."""
        shape = ", ".join(map(str, value.shape))
        head = f"{dtype_text(value.dtype)}[{shape}]"
        short = value.numel() <= INLINE and not value.is_meta and value.dtype in BY_NAME.values()
        if short and value.device.type == "cpu":
            flat = value.detach().reshape(-1)
            exact = flat.double() if value.dtype in (torch.float16, torch.bfloat16) else flat
            return f"tensor {head} {self(exact.tolist())}"
        return f"tensor {head} ${self.collected.tensor(value)}"


def read_value(scanner: Scanner, attachments: Mapping[str, Any]) -> Any:
    """One value where no node can be meant."""
    return read_literal(scanner, attachments, lambda inner: inner.fail("a value"))


def read_literal(scanner: Scanner, attachments: Mapping[str, Any], reference: Reader) -> Any:
    """One value; `reference` reads what starts with `%` or `@`."""

    def read(inner: Scanner) -> Any:
        return read_literal(inner, attachments, reference)

    if scanner.looking_at("[%@]"):
        return reference(scanner)
    if scanner.looking_at(COMPLEX):
        return _word(scanner)
    if scanner.take("("):
        return tuple(_items(scanner, ")", read))
    if scanner.take("["):
        return _items(scanner, "]", read)
    if scanner.take("{"):
        return dict(_items(scanner, "}", lambda inner: _pair(inner, read)))
    if scanner.take("$"):
        return attached(attachments, scanner.expect(r"[\w.:\-]+", "an attachment"), scanner.line)
    if scanner.match(r"tensor\b"):
        return _tensor(scanner, attachments)
    if scanner.take("slice("):
        return slice(*_items(scanner, ")", read))
    if scanner.take("..."):
        return ...
    if scanner.looking_at(RECORD):
        return _record(scanner, read)
    return _word(scanner)


def _items(scanner: Scanner, close: str, read: Reader) -> list[Any]:
    found = []
    while not scanner.take(close):
        found.append(read(scanner))
        if not scanner.take(","):
            scanner.need(close)
            break
    return found


def _pair(scanner: Scanner, read: Reader) -> tuple[Any, Any]:
    key = read(scanner)
    scanner.need(":")
    return key, read(scanner)


def _record(scanner: Scanner, read: Reader) -> Any:
    kind = scanner.expect(r"[A-Z]\w*", "the name of a record")
    scanner.need("{")
    given = dict(_items(scanner, "}", lambda inner: _field(inner, read)))
    try:
        return RECORDS[kind](**given)
    except (KeyError, TypeError):
        raise ParseError(f"line {scanner.line}: there is no record {kind} of {', '.join(given)}") from None


def _field(scanner: Scanner, read: Reader) -> tuple[str, Any]:
    name = scanner.expect(r"\w+", "the name of a field")
    scanner.need(":")
    return name, read(scanner)


def _word(scanner: Scanner) -> Any:
    text = scanner.match(STRING)
    if text is not None:
        return ast.literal_eval(text)
    text = scanner.match(COMPLEX)
    if text is not None:
        return complex(text)
    text = scanner.match(NUMBER)
    if text is not None:
        special = text.lstrip("-") in ("inf", "nan")
        return float(text) if special or any(c in text for c in ".e") else int(text)
    start = scanner.at
    text = scanner.expect(WORD, "a value")
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    if text.partition(":")[0] in DEVICES:
        return torch.device(text)
    found = BY_NAME.get(text, vars(torch).get(text.removeprefix("torch.")))
    if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
        return found
    scanner.at = start
    scanner.fail("a value", ["None", "True", "False", *BY_NAME, *DEVICES])


def read_dtype(scanner: Scanner) -> torch.dtype:
    """`f32`."""
    start = scanner.at
    name = scanner.expect(r"\w+", "a dtype")
    found = BY_NAME.get(name, vars(torch).get(name))
    if isinstance(found, torch.dtype):
        return found
    scanner.at = start
    scanner.fail("a dtype", BY_NAME)


def _tensor(scanner: Scanner, attachments: Mapping[str, Any]) -> torch.Tensor:
    dtype = read_dtype(scanner)
    scanner.need("[")
    shape = _items(scanner, "]", lambda inner: int(inner.expect(r"\d+", "a size")))
    if scanner.take("$"):
        found: torch.Tensor = attached(attachments, scanner.expect(r"[\w.:\-]+", "an attachment"), scanner.line)
        return found
    scanner.need("[")
    values = _items(scanner, "]", _word)
    if len(values) != math.prod(shape):
        scanner.fail(f"{math.prod(shape)} elements, of which there were {len(values)}")
    return torch.tensor(values, dtype=dtype).reshape(shape)
