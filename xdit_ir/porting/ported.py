"""A module that runs in parallel and is traced at its first forward."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from xdit_ir.emission.context import RunOptions
from xdit_ir.emission.parts import not_saved, without_effect
from xdit_ir.errors import MismatchError
from xdit_ir.ir.mesh import Mesh
from xdit_ir.porting.arguments import Arguments
from xdit_ir.porting.planned import Unplanned
from xdit_ir.porting.programs_of import ProgramsOf
from xdit_ir.porting.replacement import bound_to, wraps
from xdit_ir.porting.specialisations import Specialisations
from xdit_ir.runtime.shadow import Shadow


def _moving(name: str) -> Any:
    """A method that moves the module: by the original's own, unless some of it is on the meta device and stays there,
    because the port holds the weights."""

    def method(self: Ported, /, *args: Any, **kwargs: Any) -> Ported:
        self._xdit_specialisations.finish()
        if self._holds:
            getattr(nn.Module, name)(self, *args, **kwargs)
        else:
            getattr(Shadow, name)(self, *args, **kwargs)
        return self

    return functools.wraps(getattr(nn.Module, name))(method)


def _finishing(name: str) -> Any:
    """A method that changes the weights of the original, which calls that wait still need."""
    method = getattr(Shadow, name)

    def finishing(self: Ported, /, *args: Any, **kwargs: Any) -> Any:
        self._xdit_specialisations.finish()
        return method(self, *args, **kwargs)

    return functools.wraps(method)(finishing)


class _Equal(type):
    """Of a class that equals the one in `stands_for`: pipelines ask for the exact type of their components."""

    stands_for: type | None = None

    def __eq__(cls, other: object) -> bool:
        return cls is other or (cls.stands_for is not None and cls.stands_for is other)

    def __hash__(cls) -> int:
        return type.__hash__(cls) if cls.stands_for is None else hash(cls.stands_for)


class Ported(ProgramsOf, Shadow, metaclass=_Equal):
    """`original`, parallel: the same state, attributes, class and `forward` signature.

    Reloaded weights take effect at once. Weights of other shapes, dtypes or device, replaced submodules and forwards,
    changed attributes, hooks, closures, globals and classes are noticed and the model is traced anew, so that adapters
    may come, go and change their scale. After a change of anything else that forward reads (files, what compiled
    libraries keep, a tensor on a GPU that is written to through `.data`), call `reset`.
    """

    _xdit_specialisations: Specialisations

    def __new__(cls, original: nn.Module, *_: Any, **__: Any) -> Ported:
        """Of a class of its own, which equals that of the original."""
        kind: Any = _Equal("Ported", (Ported,), {"stands_for": type(original), "__module__": __name__})
        made: Ported = object.__new__(kind)
        return made

    def __init__(
        self,
        original: nn.Module,
        mesh: Mesh,
        schedule: Mapping[str, Any],
        options: RunOptions,
        *,
        pays: bool = False,
        unplanned: Unplanned | None = None,
    ) -> None:
        super().__init__(original)
        made = Specialisations.of(original, mesh, schedule, options, pays=pays, unplanned=unplanned)
        self.__dict__["_xdit_specialisations"] = made

    @property
    def _xdit_made(self) -> Specialisations:
        return self._xdit_specialisations

    def __setattr__(self, name: str, value: Any) -> None:
        """`forward` put here is traced instead of the original's, unless it wraps the port's own."""
        if name != "forward" or wraps(value, self, Ported._xdit_forward):
            Shadow.__setattr__(self, name, value)
            return
        original = self._xdit_original
        self.__dict__.pop("forward", None)
        original.forward = bound_to(value, self, original)
        self.__dict__["_xdit_signature"] = inspect.signature(original.forward)

    def __delattr__(self, name: str) -> None:
        Shadow.__delattr__(self, name)
        if name == "forward":
            self.__dict__["_xdit_signature"] = inspect.signature(self._xdit_original.forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ported:
        mine = self._xdit_specialisations
        original, pays = copy.deepcopy(self._xdit_original, memo), mine.making.worth is not None
        return Ported(original, mine.mesh, mine.schedule, mine.options, pays=pays, unplanned=mine.unplanned)

    def __getattr__(self, name: str) -> Any:
        """`device` of a port that holds its weights itself is where it runs: its original is on the meta device."""
        found = Shadow.__getattr__(self, name)
        if name != "device" or not self._holds:
            return found
        return self._xdit_specialisations.options.loading.device(self._xdit_original)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Ported:
        def apply(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(fn(torch.empty_like(tensor, device="cpu")[:0]).dtype) if tensor.is_meta else fn(tensor)

        self._xdit_specialisations.finish()
        self._xdit_original._apply(apply if self._holds else fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's; raises `MismatchError` where the port holds weights already, or will read them."""
        self._xdit_specialisations.finish()
        if self._holds and self._xdit_specialisations.found:
            raise MismatchError(without_effect("a state dict was loaded into"))
        given = args[0] if args else kwargs.get("state_dict", {})
        self._xdit_specialisations.options.loading.check_loaded(given)
        return Shadow.load_state_dict(self, *args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's; raises `MismatchError` where the port holds the weights, as nothing would be saved."""
        given_up = self._xdit_specialisations.options.loading.weights is None and any(
            tensor.is_meta for tensor in self._xdit_original.parameters()
        )
        if self._holds and (given_up or self._xdit_specialisations.found):
            raise MismatchError(not_saved())
        return Shadow.state_dict(self, *args, **kwargs)

    to = _moving("to")
    cuda = _moving("cuda")
    cpu = _moving("cpu")
    half = _finishing("half")
    float = _finishing("float")
    double = _finishing("double")
    bfloat16 = _finishing("bfloat16")

    @property
    def _holds(self) -> bool:
        """Whether weights are elsewhere than in the original, which may be on the meta device."""
        return self._xdit_specialisations.options.loading.holds

    @_disable_dynamo  # compiled by who uses it, it is called as it is
    def _xdit_forward(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._xdit_specialisations.call(Arguments(args, kwargs))
