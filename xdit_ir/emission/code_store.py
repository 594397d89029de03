"""Compiled code on disk, beside the compiler's own caches: what one process has made of a body, another one loads, and
neither runs it with symbols nor traces it for the compiler again.

What is found is made of the same structure by the same operators for the same device, and is used for numbers that its
template fits, and for tensors that its guards take; all else is compiled as ever, which the log says at level DEBUG.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import sys
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch._C._dynamo.guards import GlobalStateGuard
from torch._dynamo.exc import BackendCompilerFailed

from xdit_ir.capture.mode_guards import torch_settings
from xdit_ir.emission import kept_files
from xdit_ir.emission.structure import Structure
from xdit_ir.emission.template import Template
from xdit_ir.emission.tracing import tracing

LOG = logging.getLogger("xdit_ir")

_ROOMS = ("emission", "ir", "kernels", "transport")  # whose functions become part of code
_GUARDS = "guard_filter_fn"


@dataclass(frozen=True, eq=False)
class LoadedCode:
    """Code that needs no tracing: `run(*tensors)` is right for those tensors only which `takes` accepts."""

    run: Callable[..., Any]
    names: tuple[str, ...]
    is_mode: Callable[[], bool]
    fits: Callable[[dict[str, Any]], bool]

    @staticmethod
    def of(made: Any) -> LoadedCode:
        """Of a `torch._dynamo.aot_compile.AOTCompiledFunction` for the modes that are now; its own call looks at no
        modes, and binds a signature each time."""
        found = made._artifacts
        return LoadedCode(
            made.fn, tuple(found.signature.parameters), GlobalStateGuard().check, found.guard_manager.check
        )

    def takes(self, given: Sequence[Any]) -> bool:
        """Whether it was compiled for such tensors, in these modes."""
        return self.is_mode() and self.fits(dict(zip(self.names, given, strict=True)))


@dataclass(frozen=True)
class KeptCode:
    """The place of a body's code for one template: `path` and a suffix; that of code names the modes of a call."""

    path: Path

    @property
    def template(self) -> Template | None:
        """What its numbers may be; None if that is not here, or is damaged."""
        try:
            found = json.loads(self.path.with_suffix(".json").read_text())
            return Template(tuple(found["fixed"]), tuple(found["arguments"]))
        except (OSError, ValueError, KeyError):
            return None

    def load(self) -> LoadedCode | None:
        """What is here for the modes that are now; None if nothing is, or it cannot be used."""
        code = self._code()
        if not code.exists():
            return None
        try:
            with code.open("rb") as file:
                found = LoadedCode.of(torch.compiler.load_compiled_function(file))
        except Exception as error:  # whatever is wrong with what others wrote: it is compiled again, and written anew
            LOG.debug("kept code cannot be used and is compiled anew: %s: %r", code, error)
            return None
        kept_files.used(code, self.path.with_suffix(".json"))
        return found

    def make(
        self, function: Callable[..., Any], options: Mapping[str, Any], given: Sequence[Any], template: Template
    ) -> LoadedCode | None:
        """Compile a function for these tensors and keep what that gives; None if it cannot be kept. Raises what the
        compiler cannot do with symbols: it would take as long to fail again."""
        try:
            with tracing(enable_aot_compile=True):
                compiled: Any = torch.compile(
                    function, fullgraph=True, dynamic=False, options={**options, _GUARDS: _of_arguments}
                )
                made = compiled.aot_compile((tuple(given), {}))
            kept_files.write(self._code(), type(made).serialize(made).serialized_data)
            kept_files.write(self.path.with_suffix(".json"), json.dumps(vars(template)).encode())
            kept_files.trim(self.path.parents[1])
            return LoadedCode.of(made)
        except Exception as error:  # also of what cannot be compiled at all: who compiles it as ever is told why
            if template.distinct and isinstance(error, BackendCompilerFailed):
                raise
            LOG.debug("code cannot be kept on disk, so every process compiles it: %s: %r", self.path, error)
            return None

    def _code(self) -> Path:
        return self.path.with_suffix(f".{_digest(GlobalStateGuard().__getstate__())}.code")


@dataclass(frozen=True)
class CodeStore:
    """That of `device` in this process."""

    folder: Path
    device: torch.device

    @staticmethod
    def of(device: torch.device) -> CodeStore | None:
        """Where the compiler has its caches; None if it shall have none."""
        from torch._inductor import config
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        if config.force_disable_caches or not config.fx_graph_cache:
            return None
        return CodeStore(Path(cache_dir()) / "xdit_ir", device)

    @cached_property
    def _sources(self) -> str:
        """A hash of the functions that code is made of."""
        found = hashlib.blake2b(digest_size=16)
        for room in _ROOMS:
            for path in sorted((Path(__file__).parents[1] / room).glob("*.py")):
                found.update(path.read_bytes())
        return found.hexdigest()

    @property
    def _circumstances(self) -> Hashable:
        """What code depends on besides its structure and options."""
        from torch._functorch import config as functions
        from torch._inductor import config

        place = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        settings = [sorted(one.save_config_portable().items()) for one in (config, functions)]
        versions = torch.__version__, torch.version.git_version, sys.version, self._sources
        return *versions, str(self.device), gpu, place, torch_settings(), repr(settings)

    def find(self, structure: Structure, options: Mapping[str, Any]) -> tuple[Template, KeptCode] | None:
        """The most general template that a structure's numbers fit, of those that code was kept for."""
        folder = self._folder(structure, options)
        if folder is None:
            return None
        kept = [KeptCode(path.with_suffix("")) for path in sorted(folder.glob("*.json"))]
        found = [(template, one) for one in kept if (template := one.template) and template.fits(structure.numbers)]
        return max(found, key=lambda pair: len(pair[0].distinct), default=None)

    def place(self, structure: Structure, options: Mapping[str, Any], template: Template) -> KeptCode | None:
        """Where code for a template goes; None if no other process would find it."""
        folder = self._folder(structure, options)
        return None if folder is None else KeptCode(folder / _digest(template))

    def _folder(self, structure: Structure, options: Mapping[str, Any]) -> Path | None:
        try:
            plain = sorted((name, value) for name, value in options.items() if name != _GUARDS)
            return self.folder / _digest((_named(structure.key), plain, self._circumstances))
        except TypeError as error:
            LOG.debug("code cannot be kept on disk, so every process compiles it: %s", error)
            return None


def function_of(graph: fx.Graph) -> types.FunctionType:
    """A graph of functions as a function without a module around it."""
    code = graph.python_code("")
    namespace = dict(code.globals)
    exec(compile(code.src.replace("forward(self, ", "forward(", 1), "<body>", "exec"), namespace)
    function: types.FunctionType = namespace["forward"]
    function.__module__ = __name__
    return function


def _of_arguments(guards: Sequence[Any]) -> list[bool]:
    """Those of what code is given, and of modes; what others name is part of what it is found by."""
    from torch._dynamo.guards import CheckFunctionManager

    other = CheckFunctionManager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES
    return [not guard.is_global and guard.guard_type not in other for guard in guards]


def _named(key: Any) -> Any:
    """A structure's key with names for functions; raises `TypeError` where another process may mean another by it."""
    if isinstance(key, tuple):
        return tuple(map(_named, key))
    if isinstance(key, types.FunctionType | types.BuiltinFunctionType):
        home: Any = sys.modules.get(key.__module__)
        for name in key.__qualname__.split("."):
            home = getattr(home, name, None)
        if home is not key or key.__module__.partition(".")[0] not in ("xdit_ir", "torch", "_operator", "math"):
            raise TypeError(f"{key} is not found by its name")
        return f"{key.__module__}.{key.__qualname__}"
    return str(key)


def _digest(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
