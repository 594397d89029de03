"""A program in a file: the text, and beside it the tensors that the text refers to."""

from __future__ import annotations

from pathlib import Path

import torch

from xdit_ir.errors import ParseError, XditError
from xdit_ir.ir.program import Program
from xdit_ir.text.parse import parse
from xdit_ir.text.write import write


def tensors_path(path: Path) -> Path:
    """`model.ir` has its tensors in `model.ir.tensors`."""
    return path.with_name(path.name + ".tensors")


def save(program: Program, path: Path | str) -> list[Path]:
    """Write a program; returns the files. Opaque modules are not written: such a text is for reading only."""
    path, document = Path(path), write(program)
    tensors = {key: item for key, item in document.attachments.items() if isinstance(item, torch.Tensor)}
    try:
        path.write_text(document.text)
        tensors_path(path).unlink(missing_ok=True)
        if tensors:
            torch.save({key: tensor.detach().clone() for key, tensor in tensors.items()}, tensors_path(path))
    except OSError as error:
        raise XditError(f"cannot write {error.filename or path}: {error.strerror}") from None
    return [path, tensors_path(path)] if tensors else [path]


def load(path: Path | str) -> Program:
    """Read a program that `save` wrote, or a person.

    Raises:
        ParseError: the text is wrong, or refers to what is not in the file of tensors.
    """
    path = Path(path)
    try:
        text = path.read_text()
        beside = tensors_path(path)
        tensors = torch.load(beside, weights_only=True, map_location="cpu") if beside.exists() else {}
    except (OSError, UnicodeDecodeError) as error:
        raise XditError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None
    try:
        return parse(text, tensors)
    except ParseError as error:
        raise ParseError(f"{path}: {error}") from None
