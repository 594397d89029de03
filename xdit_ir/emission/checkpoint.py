"""Weights that one rank holds for itself: read tensor by tensor from a checkpoint, or taken from a loaded model."""

from __future__ import annotations

import difflib
import gc
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdit_ir.emission.parts import NOTHING, AllStored, GivenUp, StoredParts, whole_names
from xdit_ir.emission.state import ModelWeights, check_type, running_device
from xdit_ir.errors import MismatchError, ParallelizeError
from xdit_ir.ir.named_tensors import Place, find_tensor, named_tensors
from xdit_ir.ir.program import TensorSpec
from xdit_ir.ir.stored import Filling, bytes_of
from xdit_ir.ir.wrappers import hollow_like, parts_inside
from xdit_ir.transport.uploads import room_beside

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


class FixedWeights:
    """Tensors that do not change, in the order of a program's names; stands where `WeightReferences` does."""

    places = None  # nobody puts others there

    def __init__(self, tensors: Sequence[torch.Tensor], given_up: GivenUp) -> None:
        self._tensors, self._given_up = list(tensors), given_up

    def fetch(self) -> list[torch.Tensor]:
        """The tensors; raises `MismatchError` if others were loaded in the meantime where that has no effect."""
        self._given_up.check()
        return list(self._tensors)


@dataclass
class WeightStore:
    """The weights of this rank, for all programs made of `model`.

    With a `checkpoint` they are read from there, except for those it lacks and the model has (buffers that are not
    saved); otherwise they are the model's own. `release`: the model gives its tensors up one by one and is left on the
    meta device: what this rank uses moves here, the rest is dropped. The model is not changed in any other way.
    Of what programs store in parts, this rank has its own.
    """

    model: nn.Module
    device: torch.device
    checkpoint: Checkpoint | None = None
    release: bool = False
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _parts: StoredParts = field(default_factory=StoredParts)
    _given_up: GivenUp | None = None

    def check(self, names: Sequence[str], specs: Mapping[str, TensorSpec], stored: AllStored = NOTHING) -> None:
        """Raise `MismatchError` unless `take` can give all of these; reads no data, and the index anew, so that a
        checkpoint can be mended and what needs it be called again."""
        if self.checkpoint is not None:
            self.checkpoint = Checkpoint(self.checkpoint.path)
        if self._given_up is not None:
            self._given_up.check()
        for name in (*whole_names(names, stored), *self._parts.members(names, specs, stored)):
            if name in self._tensors:
                check_type(name, self._tensors[name], specs[name])
            elif self.checkpoint is not None and self._saved(name):
                self.checkpoint.check(self._saved_as(name), specs[name])
            else:
                self._own(name, specs[name])

    def take(self, names: Sequence[str], specs: Mapping[str, TensorSpec], stored: AllStored = NOTHING) -> FixedWeights:
        """The tensors of these names, on the device; each is read or moved once, one after the other. Those that are
        `stored` in parts are this rank's."""
        self.check(names, specs, stored)
        whole = whole_names(names, stored)
        wanted = {name for name in whole if name not in self._tensors}
        parts = Filling(self._parts.lacking(names, stored), specs, room_beside(self.device))
        if self.release:
            gc.collect()  # cycles that a trace left behind hold the model's tensors, which would pile up below
        for names_of_it, places in named_tensors(self.model) if self.release else ():
            holder, leaf = places[0]
            for name in (name for path in names_of_it for name, _ in parts_inside(path, holder[leaf])):
                if not self._saved(name):
                    if name in wanted:
                        self._tensors[name] = self._own(name, specs[name]).detach().to(self.device)
                    parts.fill(name, partial(self._bytes, name, specs))
            _drop(places)
        for name in parts.wanted:
            parts.fill(name, partial(self._bytes, name, specs))
        self._parts.tensors |= parts.done()
        if self._given_up is None:
            pairs = [pair for found in named_tensors(self.model) for pair in zip(*found, strict=True)]
            kept = {name: place for name, place in pairs if place[0][place[1]].is_meta or self._is_read(name, place)}
            self._given_up = GivenUp(kept)
        for name in whole:
            if name not in self._tensors and self.checkpoint is not None and self._saved(name):
                self._tensors[name] = self.checkpoint.read(self._saved_as(name), specs[name], self.device)
            elif name not in self._tensors:
                self._tensors[name] = self._own(name, specs[name]).detach().to(self.device)
        tensors = [self._parts.tensors[stored[n]] if n in stored else self._tensors[n] for n in names]
        return FixedWeights(tensors, self._given_up)

    def originals(
        self, names: Sequence[str], specs: Mapping[str, TensorSpec], stored: AllStored
    ) -> dict[str, torch.Tensor]:
        """Of the weights of which `take` is going to store parts, those that the model has: all of each."""
        members = [name for one in self._parts.lacking(names, stored) for name, _ in one.members]
        return {name: self._own(name, specs[name]) for name in members if not self._saved(name)}

    def _bytes(self, name: str, specs: Mapping[str, TensorSpec], start: int, length: int) -> torch.Tensor:
        if name in self._tensors:
            return bytes_of(self._tensors[name]).narrow(0, start, length)
        if self.checkpoint is not None and self._saved(name):
            return self.checkpoint.read_bytes(self._saved_as(name), specs[name], start, length)
        return bytes_of(self._own(name, specs[name])).narrow(0, start, length)

    def _saved(self, name: str) -> bool:
        """Whether the checkpoint has to have it: it does, or the model has nothing either."""
        return self.checkpoint is not None and (
            self.checkpoint.called(self._saved_as(name)) in self.checkpoint.files or self._find(name) is None
        )

    def _is_read(self, name: str, place: Place) -> bool:
        """Whether what lies in a place of the model, or some part of it, is not used but read from the checkpoint."""
        return any(self._saved(part) for part, _ in parts_inside(name, place[0][place[1]]))

    def _saved_as(self, name: str) -> str:
        """Under which of its names the checkpoint has a tensor of the model: files have those with several once."""
        assert self.checkpoint is not None
        files, called = self.checkpoint.files, self.checkpoint.called
        return next((one for one in self._names.get(name, (name,)) if called(one) in files), name)

    @cached_property
    def _names(self) -> Mapping[str, Sequence[str]]:
        """All names of each tensor of the model that has several, beginning with this one."""
        found: dict[str, Sequence[str]] = {}
        for paths, [(holder, leaf), *others] in named_tensors(self.model):
            inside = [[name for name, _ in parts_inside(path, holder[leaf])] for path in (paths if others else ())]
            for names in zip(*inside, strict=True):
                found |= {name: (name, *names) for name in names}
        return found

    def _find(self, name: str) -> torch.Tensor | None:
        found = find_tensor(self.model, name)
        return None if found.is_meta else found

    def _own(self, name: str, spec: TensorSpec) -> torch.Tensor:
        found = self._find(name)
        if found is None:
            raise MismatchError(
                f"{name} has no values: the model is on the meta device, or gave it up (release=True) when it was made "
                "parallel before; load, quantise and add adapters before the first forward, or give weights=, the "
                "folder of a checkpoint"
            )
        check_type(name, found, spec)
        return found


@dataclass(frozen=True)
class Loading:
    """Options of `emit` and `port`: where this rank gets its weights from, if not by reference from the model.

    With either, they are held besides those of the model; others that are loaded into it later are refused.

    Args:
        weights: a checkpoint (a folder, a file, or an index) from which each rank reads what it uses, and nothing
            else; the model may be on the meta device. Runs where the inputs are.
        release: a loaded model gives up its weights at the first forward: what this rank uses moves to where the
            inputs are, the rest is dropped.
    """

    weights: str | Path | None = None
    release: bool = False

    def __post_init__(self) -> None:
        if self.weights is not None and not isinstance(self.weights, str | Path):
            raise ParallelizeError(f"weights={self.weights!r:.60}: expected the folder or file of a checkpoint")
        if not isinstance(self.release, bool):
            raise ParallelizeError(f"release={self.release!r}: expected True or False")

    @property
    def holds(self) -> bool:
        """Whether weights are held besides those of the model."""
        return self.weights is not None or self.release

    def check_loaded(self, names: Iterable[str]) -> None:
        """Raise `MismatchError` if any of these, which are loaded into the model, will be read from a checkpoint."""
        if self.weights is not None and (read := set(Checkpoint(Path(self.weights)).files).intersection(names)):
            raise MismatchError(
                f"{min(read)} was loaded into a port that reads it from weights={str(self.weights)!r}, so that it has "
                "no effect; port without weights=, or save into that folder what you load"
            )

    def component(self, name: str) -> Loading:
        """For a component of a pipeline, whose weights lie in a folder of its name."""
        return self if self.weights is None else replace(self, weights=Path(self.weights) / name)

    def store(self, model: nn.Module, device: torch.device) -> WeightStore | ModelWeights:
        """Where the programs of a model take their weights from."""
        if not self.holds:
            return ModelWeights(model, device)
        checkpoint = None if self.weights is None else Checkpoint(Path(self.weights))
        return WeightStore(model, device, checkpoint, self.release)

    def device(
        self, model: nn.Module, device: torch.device | str | None = None, inputs: Iterable[Any] = ()
    ) -> torch.device:
        """Where to run: `device`, or where the inputs are, or this process's GPU; or, by reference, where the model
        is."""
        if self.weights is None and (not self.release or device is not None):
            return running_device(model, device)
        if device is not None:
            return running_device(nn.Module(), device)
        given = (x.device for x in inputs if isinstance(x, torch.Tensor) and not x.is_meta)
        found = next(given, None)
        if found is not None:
            return found
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
        return torch.device("cuda", local % torch.cuda.device_count())  # a launcher may show each process one GPU


def _drop(places: Sequence[Place]) -> None:
    """Leave the shape and dtype only of a tensor, and that it is one."""
    holder, leaf = places[0]
    tensor = holder[leaf]
    if tensor.is_meta:
        return
    hollow = hollow_like(tensor)
    hollow.requires_grad_(tensor.requires_grad)
    for held, key in places:
        held[key] = hollow
