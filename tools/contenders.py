"""What `bench` compares: ways to run one forward of a model on the ranks of a job."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import xdit_ir as xir
from xdit_ir import degrees as degree_sets
from xdit_ir.emission.execution import TRANSPORTS
from xdit_ir.errors import XditError
from xdit_ir.kernels.backends import NAMES

MODES = ("eager", "compiled", "reduced", "graph", "collective")
REDUCED = "reduce-overhead"  # torch.compile's own CUDA graphs
SHARDED = "+sharded"
FORM = re.compile(
    r"(?:(?P<library>[a-z]+)-)?(?P<degrees>[a-z0-9]+)(?P<sharded>\+sharded)?:(?P<mode>[a-z]+)(?:/(?P<transport>[a-z]+))?"
    r"(?:@(?P<attention>[a-z0-9-]+))?"
)
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Contender:
    """`library` (ours: empty) with these degrees in one of `MODES`; the original model alone has degrees `alone`.

    `graph` is compiled and recorded as one CUDA graph; `collective` the same without exchanges by copy engines. Of what
    is not ours, `reduced` is compiled with torch.compile's mode "reduce-overhead", block by block as `compiled` is.
    `attention` is the kernel for attention, `transport` how exchanges travel, as in `port`; `sharded`: weights are
    divided over ranks (all three ours only).
    """

    library: str
    degrees: str
    mode: str
    attention: str = "auto"
    transport: str = "auto"
    sharded: bool = False

    def __str__(self) -> str:
        chosen = "" if self.transport == "auto" else f"/{self.transport}"
        chosen += "" if self.attention == "auto" else f"@{self.attention}"
        return f"{self.library}-{self.degrees}{SHARDED if self.sharded else ''}:{self.mode}{chosen}".lstrip("-")

    @staticmethod
    def parse(text: str) -> Contender:
        """From its text, e.g. `alone:compiled`, `u2:graph@sdpa`, `diffusers-u2:compiled`, `xdit-u2:eager`.

        Raises:
            XditError: there is no such contender; names what is expected.
        """
        found = FORM.fullmatch(text.strip())
        if found is None or found["mode"] not in MODES or (found["library"] or "") not in PREPARE:
            known = ", ".join(name for name in PREPARE if name)
            raise XditError(
                f"{text!r} is no contender: write [LIBRARY-]DEGREES[{SHARDED}]:MODE[/TRANSPORT][@ATTENTION] with "
                f"LIBRARY one of {known} (nothing: xdit-ir), DEGREES `alone` or like u2 or c2u2, and MODE one of "
                f"{', '.join(MODES)}"
            )
        if found["degrees"] != "alone":
            degree_sets.parse(found["degrees"])
            if found["mode"] == "reduced" and not found["library"]:
                raise XditError(f"{text!r}: ours has its own CUDA graphs; write {found['degrees']}:graph")
        attention = found["attention"] or "auto"
        if attention != "auto" and (found["library"] or found["degrees"] == "alone" or attention not in NAMES):
            raise XditError(f"{text!r}: @ names a kernel for attention of xdit-ir, one of {', '.join(NAMES)}")
        transport, alone = found["transport"] or "auto", bool(found["library"]) or found["degrees"] == "alone"
        if transport not in TRANSPORTS or (transport != "auto" and alone):
            raise XditError(f"{text!r}: / names how exchanges of xdit-ir travel, one of {', '.join(TRANSPORTS)}")
        if found["sharded"] and alone:
            raise XditError(f"{text!r}: {SHARDED} is for degrees of xdit-ir, such as u2{SHARDED}:graph")
        sharded = bool(found["sharded"])
        return Contender(found["library"] or "", found["degrees"], found["mode"], attention, transport, sharded)

    def prepare(self, model: nn.Module, example: Mapping[str, Any]) -> Forward:
        """A forward of the model for inputs like `example`; the model itself may be changed."""
        return PREPARE[self.library](model, example, self)

    @property
    def sizes(self) -> dict[str, Any]:
        """The degrees as keyword arguments; none for the model alone."""
        return {} if self.degrees == "alone" else degree_sets.parse(self.degrees)[0].as_dict()


def _ours(model: nn.Module, example: Mapping[str, Any], contender: Contender) -> Forward:
    if contender.degrees == "alone":
        return _compiled(model, contender, fullgraph=True)
    graph = contender.mode in ("graph", "collective")
    transport = "collective" if contender.mode == "collective" else contender.transport
    return xir.port(
        model,
        **contender.sizes,
        compile=contender.mode != "eager",
        cuda_graph=graph,
        transport=transport,
        attention=contender.attention,
        **({"shard_weights": True} if contender.sharded else {}),
    )


def _compiled(model: nn.Module, contender: Contender, *, fullgraph: bool = False) -> Forward:
    """With repeated blocks compiled one by one, as diffusers' `compile_repeated_blocks` does, in its mode."""
    if contender.mode == "eager":
        return model
    reduced = contender.mode == "reduced"
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                if type(block).__name__ in (getattr(model, "_repeated_blocks", None) or [type(block).__name__]):
                    block.compile(fullgraph=fullgraph, mode=REDUCED if reduced else None)
    return _in_steps(model) if reduced else model


def _in_steps(model: nn.Module) -> Forward:
    """Calls of which each is a step to PyTorch's CUDA graphs: what one has given, the next one may overwrite."""

    def forward(**given: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return model(**given)

    return forward


def _diffusers(model: nn.Module, example: Mapping[str, Any], contender: Contender) -> Forward:
    """diffusers' own context parallel (its `ContextParallelConfig`), which stays with a module, so on a copy of it that
    has the same weights."""
    from diffusers import ContextParallelConfig

    sizes = contender.sizes
    theirs: Any = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    theirs.set_attention_backend("_native_cudnn")
    theirs.enable_parallelism(config=ContextParallelConfig(ulysses_degree=sizes["ulysses"], ring_degree=sizes["ring"]))
    return _compiled(theirs, contender)


def _cachedit(model: nn.Module, example: Mapping[str, Any], contender: Contender) -> Forward:
    """cache-dit's context parallel, without its cache, on a copy that has the same weights."""
    import cache_dit

    sizes = contender.sizes
    enable = _found("enable_parallelism", "cache_dit", "cache_dit.distributed", "cache_dit.parallelism")
    theirs: Any = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    degrees = {f"{name}_size": sizes[name] for name in ("ulysses", "ring") if sizes[name] > 1}
    theirs = enable(theirs, cache_dit.ParallelismConfig(**degrees))
    theirs.set_attention_backend("_native_cudnn")
    return _compiled(theirs, contender)


def _found(name: str, *places: str) -> Any:
    """What is called so in the first of these modules that has it; its place differs between releases."""
    for place in places:
        with suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(place), name)
    raise XditError(f"{places[0]} has no {name}; looked in {', '.join(places)}")


def _xdit(model: nn.Module, example: Mapping[str, Any], contender: Contender) -> Forward:
    """xDiT's own model class (xfuser), on the same weights."""
    from xfuser import xFuserArgs
    from xfuser.core import distributed as xdit

    sizes = contender.sizes
    if not xdit.model_parallel_is_initialized():
        xdit.init_distributed_environment(rank=dist.get_rank(), world_size=dist.get_world_size())
        xdit.initialize_model_parallel(
            classifier_free_guidance_degree=sizes["cfg"],
            sequence_parallel_degree=sizes["ulysses"] * sizes["ring"],
            ulysses_degree=sizes["ulysses"],
            ring_degree=sizes["ring"],
        )
        config, _ = xFuserArgs(
            use_cfg_parallel=sizes["cfg"] > 1, ulysses_degree=sizes["ulysses"], ring_degree=sizes["ring"]
        ).create_config()
        xdit.initialize_runtime_state(SimpleNamespace(transformer=model), config)
        if "encoder_hidden_states" in example:
            xdit.get_runtime_state().max_condition_sequence_length = example["encoder_hidden_states"].shape[1]
    cls = _xdit_class(type(model))
    names = set(inspect.signature(cls.__init__).parameters)
    with torch.device("meta"):
        theirs = cls(**{name: value for name, value in dict(model.config).items() if name in names})  # type: ignore[arg-type]
    theirs.load_state_dict(model.state_dict(), assign=True)
    return _compiled(theirs.eval(), contender)


def _xdit_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class with which xDiT replaces a diffusers class."""
    from xfuser.model_executor.models import transformers

    for info in pkgutil.iter_modules(transformers.__path__):
        try:
            module = importlib.import_module(f"{transformers.__name__}.{info.name}")
        except ImportError:
            continue
        for found in vars(module).values():
            if isinstance(found, type) and found is not cls and cls in found.__bases__ and "xfuser" in found.__module__:
                return found
    raise XditError(f"xDiT has no class for {cls.__name__}")


PREPARE: dict[str, Callable[[nn.Module, Mapping[str, Any], Contender], Forward]] = {
    "": _ours,
    "diffusers": _diffusers,
    "xdit": _xdit,
    "cachedit": _cachedit,
}


def release(model: nn.Module) -> None:
    """Forget compiled code between contenders."""
    torch._dynamo.reset()
    for module in model.modules():
        module._compiled_call_impl = None
    torch.cuda.empty_cache()
    dist.barrier()
