"""What shall be generated, as the arguments of a pipeline's calls."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from xdit_ir.errors import GenerationError, ParallelizeError
from xdit_ir.porting.denoisers import denoisers

# What the fields of `Request` are called by pipelines.
ARGUMENTS = {
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "image": "image",
}


class UnfitRequest(GenerationError):
    """A pipeline does not take what is asked for; another request may be fine."""


@dataclass(frozen=True)
class Request:
    """Prompts, or one set of embeddings under the names of the pipeline's arguments, and what holds for all of them.

    `arguments`: further ones of the pipeline. Fields that are None are left to the pipeline.
    """

    prompts: tuple[str, ...] = ()
    embeddings: Mapping[str, Any] = field(default_factory=dict)
    negative_prompt: str | None = None
    image: Any = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many calls it takes."""
        return max(1, len(self.prompts))

    def share(self, places: Sequence[int]) -> Request:
        """For the prompts at these places."""
        return replace(self, prompts=tuple(self.prompts[place] for place in places) if self.prompts else ())

    def calls(self, pipe: Any) -> list[dict[str, Any]]:
        """The arguments of every call but the generator; one call per prompt.

        Raises:
            UnfitRequest: the pipeline does not take one of them; names it and the nearest that it takes.
        """
        given = {name: getattr(self, field) for field, name in ARGUMENTS.items()}
        shared = {name: value for name, value in given.items() if value is not None}
        shared |= {**_moved(self.embeddings, pipe), **self.arguments}
        known = parameters(pipe)
        for name in (*shared, *(("prompt",) if self.prompts else ())):
            if name not in known:
                raise UnfitRequest(_unknown(name, pipe, known))
        if "output_type" in known:
            shared.setdefault("output_type", "pil")
        return [shared | {"prompt": prompt} for prompt in self.prompts] or [shared]

    def seeded(self, pipe: Any) -> dict[str, Any]:
        """The generator of one call: the same numbers for every prompt, on every process and device."""
        torch.manual_seed(self.seed)  # for what draws noise without the generator
        return {"generator": torch.Generator().manual_seed(self.seed)} if "generator" in parameters(pipe) else {}


def dealt(prompts: Sequence[str], group: int, groups: int) -> list[int]:
    """The places of the prompts that a group generates for.

    Raises:
        ParallelizeError: prompts cannot be dealt out evenly; names the nearest legal choice.
    """
    count = max(1, len(prompts))
    if groups < 1:
        raise ParallelizeError(f"data={groups} is not a positive integer; the nearest legal one is data=1")
    if count % groups:
        legal = max(size for size in range(1, groups + 1) if count % size == 0)
        more = -(-count // groups) * groups
        raise ParallelizeError(
            f"data={groups} deals out whole prompts, and {count} cannot be divided evenly; nearest legal: "
            f"data={legal}, or {more} prompts"
        )
    share = count // groups
    return list(range(group * share, (group + 1) * share))


def read_embeddings(path: str | Path) -> dict[str, Any]:
    """The tensors of a safetensors file by argument; `NAME.0`, `NAME.1`, ... become a list.

    Raises:
        GenerationError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():  # to open a pipe could wait for ever
        raise GenerationError(f"embeddings {path} cannot be read: it is no file")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise GenerationError(f"embeddings {path} cannot be read: {error}") from error
    found: dict[str, Any] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: _place(item[0])):
        stem, number = _place(name)
        if number < 0:
            found[stem] = tensor
        else:
            found.setdefault(stem, []).append(tensor)
    return found


def check_numbers(**given: Any) -> None:
    """Raise `GenerationError` for what counts something and is no positive integer; None is left to the pipeline."""
    for name, value in given.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise GenerationError(f"{name}={value!r} is not a positive integer; the nearest legal one is {name}=1")


def check_seed(seed: Any) -> None:
    """Raise `GenerationError` for what torch takes as no seed."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 63:
        raise GenerationError(f"seed={seed!r}: expected an integer from 0 to 2**63 - 1")


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of `1024x768`.

    Raises:
        GenerationError: it is no such text.
    """
    match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", text.strip())
    if match is None:
        raise GenerationError(f"size {text!r}: expected WIDTHxHEIGHT in pixels, as in 1024x1024")
    return int(match[1]), int(match[2])


def parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """What a pipeline's call takes, by name."""
    listed = inspect.signature(type(pipe).__call__).parameters
    return {name: one for name, one in listed.items() if name != "self" and one.kind is not one.VAR_KEYWORD}


def _unknown(name: str, pipe: Any, known: Mapping[str, Any]) -> str:
    field = next((field for field, argument in ARGUMENTS.items() if argument == name), name)
    asked = field if field == name else f"{field} ({name})"
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"the nearest that it takes is {close[0]!r}" if close else f"it takes {', '.join(known)}"
    return f"{type(pipe).__name__} does not take {asked}; {hint}"


def _place(name: str) -> tuple[str, int]:
    stem, dot, number = name.rpartition(".")
    return (stem, int(number)) if dot and number.isdigit() else (name, -1)


def _moved(embeddings: Mapping[str, Any], pipe: Any) -> dict[str, Any]:
    """Embeddings where the pipeline runs; floating-point ones in its denoisers' dtype."""
    if not embeddings:
        return {}
    device: torch.device = pipe.device
    dtype: Any = next(iter(denoisers(pipe).values())).dtype

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

    return {
        name: [move(one) for one in value] if isinstance(value, list) else move(value)
        for name, value in embeddings.items()
    }
