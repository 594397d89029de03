"""What runs one rank's part of a program in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from xdit_ir.deferral.recorded import Numbers
from xdit_ir.emission.code_writer import EmittedBody
from xdit_ir.emission.execution import Tensors
from xdit_ir.ir.program import Program
from xdit_ir.reflection.versions import Versions
from xdit_ir.sharding.report import CacheUse
from xdit_ir.transport.handshake import Facts


class RankRunner(Protocol):
    """Ready to run; `facts` are equal on two ranks only if they run the same program, for the same guarded values.
    `places`: the dicts of the model at which `bind` looks, if it does."""

    facts: Facts
    places: Versions | None
    program: Program

    def held(self, weights: Tensors) -> tuple[Sequence[str], Tensors]:
        """Names and tensors of all weights that are here, given those that are used."""
        ...

    @property
    def bodies(self) -> Mapping[str, EmittedBody]:
        """The shared blocks."""
        ...

    @property
    def execution(self) -> str:
        """How it runs, and what does not run as it should."""
        ...

    @property
    def cache(self) -> CacheUse | None:
        """How often a step cache was of use, if there is one."""
        ...

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
        """Inputs and weights for one call; raises `MismatchError` if the program was not made for them."""
        ...

    def plain(self, inputs: Tensors) -> Mapping[str, torch.Tensor | Numbers]:
        """Those inputs, by name, that hold something before the call; of others, what they are made with."""
        ...

    def vote(self, inputs: Tensors) -> tuple[int, bool]:
        """What all ranks must agree on before a call, and whether that may be compared later."""
        ...

    def told(self, inputs: Tensors) -> Facts:
        """What that is, besides arguments and program, for ranks that do not agree."""
        ...

    def run(self, inputs: Tensors, weights: Tensors, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's result; what forward leaves in caches is left in the arguments."""
        ...

    def forget(self) -> None:
        """Free what was recorded."""
        ...
