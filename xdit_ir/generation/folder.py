"""A pipeline's folder: checked before anything is loaded, and loaded so that ranks read what they use."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdit_ir.emission.checkpoint import SHARD, Checkpoint
from xdit_ir.errors import GenerationError, XditError
from xdit_ir.porting.denoisers import components, takes_timestep

INDEX = "model_index.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
# One dtype for all, or by component, with `default` for the others.
Dtypes = torch.dtype | Mapping[str, torch.dtype] | None


@dataclass(frozen=True)
class Loaded:
    """A pipeline, and the folder from which its denoisers are read by each rank (None: they are loaded)."""

    pipe: Any
    weights: Path | None


def load(source: str | Path, dtype: Dtypes = None, *, whole: bool = False) -> Loaded:
    """A pipeline from a folder that `save_pretrained` wrote, or from the hub.

    Its denoisers stay on the meta device, to be read from the files by `port(weights=)`: tensor by tensor, and by each
    rank only what it uses. Processes of a node map the same files, so that each is read from the disk once.
    With `whole`, and where that cannot be (quantised models, files of another format), they are loaded as well.

    Raises:
        GenerationError: no such pipeline.
        MismatchError: a file is missing or damaged, or lacks a tensor; names both. Nothing is loaded then.
    """
    import diffusers

    folder = find(source)
    check(folder)
    try:
        bare = {} if whole else _bare(folder, dtype)
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, **bare)
    except XditError:
        raise
    except Exception as error:  # whatever its files make of diffusers
        raise GenerationError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error
    check_dtypes(pipe, dtype)
    return Loaded(pipe, folder if bare else None)


def find(source: str | Path) -> Path:
    """The folder itself, or that of the cache into which the hub's was brought.

    Raises:
        GenerationError: there is none; names one near it.
    """
    import diffusers

    folder = Path(source)
    if (folder / INDEX).is_file():
        return folder
    if folder.exists():
        near = [where for where in (folder.parent, *sorted(folder.glob("*/"))) if (where / INDEX).is_file()]
        hint = f"; did you mean {near[0]}?" if near else "; expected what save_pretrained of a pipeline writes"
        raise GenerationError(f"{folder} has no {INDEX}{hint}")
    text = str(source)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        beside = [entry.name for entry in folder.parent.glob("*/")] if folder.parent.is_dir() else []
        close = difflib.get_close_matches(folder.name, beside, n=1)
        hint = f"; did you mean {folder.parent / close[0]}?" if close else ""
        raise GenerationError(f"there is no folder {text}{hint}")
    try:
        return Path(diffusers.DiffusionPipeline.download(text))
    except (OSError, ValueError) as error:
        raise GenerationError(f"{text} is no folder, and the hub does not give it: {error}") from error


def check(folder: Path) -> None:
    """Raise `MismatchError` unless the weights of every component are whole, as far as headers of files tell."""
    for name in _index(folder):
        if list((folder / name).glob(f"*{SHARD}")) or list((folder / name).glob(f"*{SHARD}.index.json")):
            Checkpoint(folder / name).verify()


def check_dtypes(pipe: Any, chosen: Dtypes = None) -> None:
    """Raise `GenerationError` if components that work on each other's results have different dtypes; names them.

    Autoencoders (what can `decode`) are free to have another one, which pipelines expect, and so are components that
    `chosen` names.
    """
    named = chosen if isinstance(chosen, Mapping) else {}
    found = {
        name: _dtype(module)
        for name, module in components(pipe).items()
        if name not in named and not hasattr(module, "decode")
    }
    dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in found.items() if dtype is not None}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise GenerationError(
            f"components of {type(pipe).__name__} have different dtypes: {listed}; give one dtype for all (bf16), or "
            "name those that shall differ (bf16,text_encoder=fp32)"
        )


def parse_dtypes(text: str) -> Dtypes:
    """`bf16`, or `bf16,vae=fp32,...`, as text.

    Raises:
        GenerationError: there is no such dtype.
    """
    found: dict[str, torch.dtype] = {}
    for item in text.split(","):
        name, _, word = item.strip().rpartition("=")
        if word not in DTYPES:
            raise GenerationError(f"dtype {item!r}: expected one of {', '.join(DTYPES)}, or COMPONENT=DTYPE")
        found[name or "default"] = DTYPES[word]
    return found if set(found) != {"default"} else found["default"]


def checked_dtypes(given: Any) -> Dtypes:
    """What was given for `dtype`: also the text of the command line.

    Raises:
        GenerationError: it is no dtype that components may have.
    """
    if isinstance(given, str):
        return parse_dtypes(given)
    each = list(given.values()) if isinstance(given, Mapping) else [] if given is None else [given]
    for one in each:
        if one not in DTYPES.values():
            raise GenerationError(f"dtype={one!r}: expected torch.bfloat16, torch.float16, torch.float32, or 'bf16'")
    return given  # type: ignore[no-any-return]


def _dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of most of a module's numbers; some layers stay in float32 on purpose."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def _index(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of every component of a pipeline."""
    try:
        index = dict(json.loads((folder / INDEX).read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise GenerationError(f"{folder / INDEX} cannot be read: {error}") from error
    return {
        name: (entry[0], entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    }


def _bare(folder: Path, dtype: Dtypes) -> dict[str, nn.Module]:
    """The denoisers on the meta device; none if one of them has to be loaded."""
    found: dict[str, nn.Module] = {}
    for name, (library, kind) in _index(folder).items():
        cls = getattr(importlib.import_module(library), kind, None) if library == "diffusers" else None
        if not (isinstance(cls, type) and issubclass(cls, nn.Module) and takes_timestep(cls)):
            continue
        config = cls.load_config(folder / name)  # type: ignore[attr-defined]
        if "quantization_config" in config or not list((folder / name).glob(f"*{SHARD}")):
            return {}
        wanted = dtype.get(name, dtype.get("default")) if isinstance(dtype, Mapping) else dtype
        found[name] = empty(cls, config, wanted or torch.float32)
        saved = [key for key, tensor in found[name].state_dict().items() if tensor.is_meta]
        Checkpoint(folder / name).verify(saved)
    return found


def empty(cls: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """A model of diffusers as `from_pretrained` makes it for `dtype`, before weights are loaded: on the meta device,
    except for what is not saved."""
    from accelerate import init_empty_weights

    with _default(dtype), init_empty_weights():
        model: nn.Module = cls.from_config(config)
    kept = cls._keep_in_fp32_modules or ()
    kept = (kept,) if isinstance(kept, str) else tuple(kept)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.is_meta:
            apart = any(part in kept for part in name.split("."))
            tensor.data = tensor.data.to(torch.float32 if apart else dtype)
    return model.eval()


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
