"""Where a rank gets its weights from: the options of `emit` and `port`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdit_ir.emission.checkpoint import Checkpoint
from xdit_ir.emission.state import ModelWeights, running_device
from xdit_ir.emission.weight_store import WeightStore
from xdit_ir.errors import MismatchError, ParallelizeError


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
