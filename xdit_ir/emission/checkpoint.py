"""Weights in files: safetensors, read tensor by tensor."""

from __future__ import annotations

import difflib
import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from xdit_ir.errors import MismatchError
from xdit_ir.ir.program import TensorSpec
from xdit_ir.ir.stored import bytes_of

INDEX, SHARD = ".safetensors.index.json", ".safetensors"
# What safetensors calls dtypes that may stand for each other, as in `from_pretrained(..., torch_dtype=...)`.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Checkpoint:
    """Tensors in safetensors files: in one file, or in shards that an index lists. Nothing is kept open or in memory.

    Args:
        path: a folder, as diffusers' `save_pretrained` writes it, a `.safetensors` file, or an index.

    Raises:
        MismatchError: from every method; names the file, and the tensor if it is about one.
    """

    path: Path

    @cached_property
    def source(self) -> Path:
        """The index or the only file."""
        if not self.path.is_dir():
            return self.path
        try:
            names = sorted(entry.name for entry in self.path.iterdir())
        except OSError as error:
            raise MismatchError(f"{self.path} cannot be read: {error}") from error
        for suffix in (INDEX, SHARD):
            found = [name for name in names if name.endswith(suffix)]
            plain = [name for name in found if name.count(".") == suffix.count(".")]  # no variant, as `.fp16.`
            for choice in (found, plain):
                if len(choice) == 1:
                    return self.path / choice[0]
            if found:
                raise MismatchError(f"{self.path} has several checkpoints: {', '.join(found)}; give the one you mean")
        inside = sorted({file.parent.name for file in self.path.glob(f"*/*{SHARD}")})
        hint = f"; did you mean its folder {' or '.join(inside)}?" if inside else ""
        raise MismatchError(f"{self.path} has no {SHARD} file and no {INDEX}{hint}")

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """The file of every tensor."""
        if not self.source.name.endswith(".json"):
            with _opened(self.source, "") as file:
                return dict.fromkeys(file.keys(), self.source)
        _check_file(self.source)
        try:
            listed = dict(json.loads(self.source.read_text())["weight_map"].items())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise MismatchError(f"{self.source} is not an index of safetensors files: {error!r}") from error
        return {name: self._listed(name, file) for name, file in listed.items()}

    def _listed(self, name: str, file: Any) -> Path:
        """A file that the index names, which lies beside it or below."""
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts or "\0" in file:
            raise MismatchError(
                f"{self.source}: tensor {name!r} is in {file!r}; expected the name of a file in {self.source.parent}"
            )
        return self.source.parent / file

    def verify(self, names: Iterable[str] = ()) -> None:
        """Raise unless every file is whole and has the tensors that are listed, and `names` are among them; reads
        headers only."""
        listed: dict[Path, list[str]] = {}
        for name, path in self.files.items():
            listed.setdefault(path, []).append(name)
        for path, expected in listed.items():
            with _opened(path, expected[0]) as file:
                held = set(file.keys())
            for name in expected:
                if name not in held:
                    raise MismatchError(f"{path} has no tensor {name!r}, though {self.source.name} says so")
        for name in names:
            self._file(name)

    def called(self, name: str) -> str:
        """What the files call a tensor: a part of a quantised weight (`to_q.weight.scale`) may be `to_q._weight_scale`
        there, as torchao flattens state dicts."""
        *path, leaf, part = ("", *name.split("."))
        flat = ".".join([*path[1:], f"_{leaf}_{part}"])
        return flat if name not in self.files and flat in self.files else name

    def check(self, name: str, spec: TensorSpec) -> None:
        """Raise unless the tensor is there and fits; reads headers only."""
        path, name = self._file(name), self.called(name)
        with _opened(path, name) as file:
            if name not in file.keys():  # noqa: SIM118
                raise MismatchError(f"{path} has no tensor {name!r}, though {self.source.name} says so")
            header = file.get_slice(name)
            shape, kind = tuple(header.get_shape()), str(header.get_dtype())
        fits = kind in FLOATING and spec.dtype in FLOATING.values()
        if shape != spec.shape or not (fits or OTHERS.get(kind) == spec.dtype):
            raise MismatchError(
                f"{path}: tensor {name!r} is {kind}{list(shape)}, the program needs {spec.dtype}{list(spec.shape)}"
            )

    def read(self, name: str, spec: TensorSpec, device: torch.device) -> torch.Tensor:
        """The tensor, in memory of its own; floating-point numbers are cast to the program's dtype.

        The file is mapped for this tensor only, so that its pages do not pile up.
        """
        self.check(name, spec)
        result = torch.empty(spec.shape, dtype=spec.dtype, device=device)
        with self._reading(name) as file:
            result.copy_(file.get_tensor(self.called(name)))
        return result

    def read_bytes(self, name: str, spec: TensorSpec, start: int, length: int) -> torch.Tensor:
        """Bytes of the tensor from `start` on, cast as `read` does; only the rows that have them are read."""
        self.check(name, spec)
        if not spec.shape:
            return bytes_of(self.read(name, spec, torch.device("cpu"))).narrow(0, start, length)
        row = spec.nbytes // spec.shape[0]
        first, last = start // row, -(-(start + length) // row)
        with self._reading(name) as file:
            rows = file.get_slice(self.called(name))[first:last]
            return bytes_of(rows.to(spec.dtype)).narrow(0, start - first * row, length).clone()

    @contextmanager
    def _reading(self, name: str) -> Iterator[Any]:
        """The shard that has a tensor, opened; what cannot be read of it is named."""
        path = self._file(name)
        with _opened(path, name) as file:
            try:
                yield file
            except (OSError, RuntimeError, ValueError) as error:
                raise MismatchError(f"{path}: tensor {name!r} cannot be read: {error}") from error

    def _file(self, name: str) -> Path:
        name = self.called(name)
        if name not in self.files:
            near = difflib.get_close_matches(name, self.files, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise MismatchError(f"{self.source} has no tensor {name!r} that the program needs{hint}")
        return self.files[name]


def _check_file(path: Path, wanted: str = "") -> None:
    """Raise unless there is such a file; to open something else, such as a pipe, could wait for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise MismatchError(f"{path} {what}{wanted}") from error
    if not stat.S_ISREG(mode):
        raise MismatchError(f"{path} is no file{wanted}")


def _opened(path: Path, name: str) -> Any:
    """A shard, opened by safetensors, which checks its header and its length."""
    from safetensors import SafetensorError, safe_open

    wanted = f" (for tensor {name!r})" if name else ""
    _check_file(path, wanted)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise MismatchError(f"{path} is damaged or truncated{wanted}: {error}") from error
