"""Each rank reads its own weights: from shards or from a loaded model, tensor by tensor, with errors that say where."""

from __future__ import annotations

import gc
import json
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_map

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.emission.checkpoint import Checkpoint
from xdit_ir.emission.weight_store import WeightStore
from xdit_ir.ir.program import TensorSpec

Saved = tuple[nn.Module, dict[str, Any], Path]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A model, its example, and its checkpoint in several shards."""
    model, example = models.load("flux.1-dev:tiny")
    folder = tmp_path_factory.mktemp("flux") / "transformer"
    model.save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return model, example, folder


@pytest.fixture
def damaged(saved: Saved, tmp_path: Path) -> Path:
    """A copy of the checkpoint to spoil."""
    for file in saved[2].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def empty(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model as a diffusers user makes it before its weights are loaded."""
    with init_empty_weights():
        return type(model).from_config(model.config).to(dtype).eval()


def run(model: nn.Module, example: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**example)[0]


def shard_of(folder: Path, name: str) -> Path:
    [index] = folder.glob("*.index.json")
    return folder / json.loads(index.read_text())["weight_map"][name]


def test_a_model_without_weights_runs_from_a_checkpoint(saved: Saved) -> None:
    model, example, folder = saved
    want = run(model, example)
    bare = empty(model)
    emitted = xir.trace(bare, example).parallelize().emit(bare, weights=folder)
    torch.testing.assert_close(run(emitted, example), want, rtol=1e-4, atol=1e-5)
    ported = xir.port(bare, weights=str(folder))
    torch.testing.assert_close(run(ported, example), want, rtol=1e-4, atol=1e-5)
    half = {**example, "hidden_states": example["hidden_states"][:, :128], "img_ids": example["img_ids"][:128]}
    torch.testing.assert_close(run(ported, half), run(model, half), rtol=1e-4, atol=1e-5)
    assert len(ported.programs) == 2
    assert all(tensor.is_meta for tensor in bare.parameters()), "the model holds nothing"


def test_floating_point_is_cast_to_the_models_dtype(saved: Saved) -> None:
    model, example, folder = saved
    bare = empty(model, torch.bfloat16)
    example = {
        name: x.bfloat16() if name in ("hidden_states", "encoder_hidden_states", "pooled_projections") else x
        for name, x in example.items()
    }
    emitted = xir.trace(bare, example).parallelize().emit(bare, weights=folder)
    got = run(emitted, example)
    want = run(type(model).from_pretrained(folder, torch_dtype=torch.bfloat16), example)
    assert got.dtype == torch.bfloat16
    assert ((got - want).float().norm() / want.float().norm()).item() < 2e-2


def test_a_stage_reads_its_own_tensors_only(saved: Saved, damaged: Path) -> None:
    model, example, _ = saved
    parallel = xir.trace(empty(model), example).parallelize(pipefusion=2)
    assert parallel.pipeline is not None
    names = parallel.pipeline.weights_of(1)
    specs = parallel.original.state
    needed = {shard_of(damaged, name) for name in names}
    others = set(damaged.glob("*.safetensors")) - needed
    assert others
    for file in others:
        file.unlink()
    held = WeightStore(empty(model), CPU, Checkpoint(damaged)).take(names, specs).fetch()
    state = model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in zip(names, held, strict=True))
    assert sum(x.nbytes for x in held) == sum(specs[name].nbytes for name in names)
    with pytest.raises(xir.MismatchError, match=r"safetensors is missing \(for tensor '"):
        WeightStore(empty(model), CPU, Checkpoint(damaged)).check(parallel.pipeline.weights_of(0), specs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as saved", "cast"])
def test_a_rank_reads_its_part_of_each_weight_only(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model, example, folder = saved
    traced = xir.trace(empty(model, dtype), {name: cast(x, dtype) for name, x in example.items()})
    programs = [traced.parallelize(ulysses=3, shard_weights=True).rank(rank) for rank in range(3)]
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a whole tensor is read"))
    names = list(programs[0].stored)
    stores = [WeightStore(empty(model, dtype), CPU, Checkpoint(folder)) for _ in programs]
    held = [store.take(names, one.state, one.stored).fetch() for store, one in zip(stores, programs, strict=True)]
    state = model.state_dict()
    for name, *parts in zip(names, *held, strict=True):
        whole = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
        for member, offset in programs[0].stored[name].members:
            want = state[member].to(dtype).reshape(-1).view(torch.uint8)
            assert torch.equal(whole[offset : offset + want.numel()], want), member


def cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 1 else x


NAME = "single_transformer_blocks.0.proj_mlp.weight"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, r"\.safetensors is missing \(for tensor 'single_"),
        (truncate, r"damaged or truncated \(for tensor 'single_"),
        (edit(lambda tensors: tensors.pop(NAME)), r"\.safetensors has no tensor 'single_.*index\.json says so"),
        (edit(lambda tensors: tensors.update({NAME: torch.zeros(3)})), r"'single_.*' is F32\[3\], the program needs"),
        (edit(lambda tensors: tensors.update({NAME: tensors[NAME].int()})), r"' is I32\[.*needs torch\.float32"),
    ],
    ids=["missing", "truncated", "without", "shape", "dtype"],
)
def test_errors_name_file_and_tensor(saved: Saved, damaged: Path, spoil: Callable[[Path], None], message: str) -> None:
    spec = TensorSpec(tuple(saved[0].get_parameter(NAME).shape), torch.float32)
    store = WeightStore(empty(saved[0]), CPU, Checkpoint(damaged))
    store.check([NAME], {NAME: spec})
    spoil(shard_of(damaged, NAME))
    for read in (store.check, store.take):
        with pytest.raises(xir.MismatchError, match=message):
            read([NAME], {NAME: spec})


def test_errors_of_folders_and_names(saved: Saved, damaged: Path) -> None:
    spec = TensorSpec((1,), torch.float32)
    with pytest.raises(xir.MismatchError, match=r"nearest is 'norm_out\.linear\.weight'"):
        Checkpoint(damaged).check("norm_out.linears.weight", spec)
    with pytest.raises(xir.MismatchError, match="did you mean its folder transformer"):
        Checkpoint(saved[2].parent).check("x", spec)
    with pytest.raises(xir.MismatchError, match="is missing"):
        Checkpoint(damaged / "no.safetensors").check("x", spec)
    index = next(damaged.glob("*.index.json"))
    index.write_text("{}")
    with pytest.raises(xir.MismatchError, match="is not an index"):
        Checkpoint(damaged).check("x", spec)
    index.unlink()
    with pytest.raises(xir.MismatchError, match="several checkpoints"):
        Checkpoint(damaged).check("x", spec)


def test_buffers_that_are_not_saved_come_from_the_model(tmp_path: Path) -> None:
    model, example = models.load("wan2.1-t2v-14b:tiny")
    model.save_pretrained(tmp_path)
    bare = empty(model)
    emitted = xir.trace(bare, example).parallelize().emit(bare, weights=tmp_path)
    torch.testing.assert_close(run(emitted, example), run(model, example), rtol=1e-4, atol=1e-5)
    nothing = bare.to("meta")
    with pytest.raises(xir.MismatchError, match=r"no tensor 'rope\.freqs_cos'"):
        xir.trace(nothing, example).parallelize().emit(nothing, weights=tmp_path)


def test_a_loaded_model_is_released(saved: Saved) -> None:
    _, example, _ = saved
    model, _ = models.load("flux.1-dev:tiny")
    want = run(model, example)
    ported = xir.port(model, release=True)
    assert not any(tensor.is_meta for tensor in ported.state_dict().values())
    torch.testing.assert_close(run(ported, example), want, rtol=1e-4, atol=1e-5)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    torch.testing.assert_close(run(ported, example), want, rtol=1e-4, atol=1e-5)
    ported.reset()
    with pytest.raises(xir.MismatchError, match=r"state_dict\(\) of a model whose weights"):
        ported.state_dict()


@pytest.mark.parametrize("how", ["release", "weights"])
def test_weights_that_are_loaded_where_a_port_holds_them_are_refused(saved: Saved, how: str) -> None:
    """They would have no effect. Nothing is changed by the refusal."""
    loaded, example, folder = saved
    want, other = run(loaded, example), {name: x.clone() for name, x in loaded.state_dict().items()}
    model = models.load("flux.1-dev:tiny")[0] if how == "release" else empty(loaded)
    ported = xir.port(model, **({"release": True} if how == "release" else {"weights": folder}))
    run(ported, example)
    with pytest.raises(xir.MismatchError, match=r"its port holds itself \(release=True"):
        ported.load_state_dict(other)
    with pytest.raises(xir.MismatchError, match=r"state_dict\(\) of a model whose weights.*save before the first"):
        nn.ModuleList([ported]).state_dict()  # as of a pipeline
    ported.bfloat16()
    wide = tree_map(lambda x: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, example)
    with pytest.raises(xir.MismatchError, match=r"weight was cast from torch\.float32 to torch\.bfloat16"):
        run(ported, wide)
    ported.float()
    torch.testing.assert_close(run(ported, example), want, rtol=1e-4, atol=1e-5)
    model.load_state_dict(other, assign=True)
    with pytest.raises(xir.MismatchError, match=r"was loaded into a model whose weights"):
        run(ported, example)


def fuse(layer: nn.Linear) -> None:
    """As adapters are added to weights."""
    layer.weight.data += torch.ones_like(layer.weight)


def fuse_anew(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data + torch.ones_like(layer.weight)


CHANGES: list[Callable[[nn.Linear], Any]] = [
    lambda layer: layer.load_state_dict(nn.Linear(8, 8).state_dict()),
    lambda layer: layer.weight.detach().mul_(2),
    fuse,
    fuse_anew,
]


@pytest.mark.parametrize("loaded", [False, True], ids=["released", "read"])
@pytest.mark.parametrize("change", CHANGES, ids=["load", "write", "fuse", "fuse_anew"])
def test_what_is_written_into_a_layer_is_noticed(
    change: Callable[[nn.Linear], Any], loaded: bool, tmp_path: Path
) -> None:
    """Where the port holds its weights: also where the model still has values, of which none are used."""
    if loaded and change in (fuse, fuse_anew):
        pytest.skip("of a tensor with values nothing tells of writes through `.data`")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False), torch.randn(2, 8)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        want = model(x)
        ported = xir.port(model, **({"weights": tmp_path} if loaded else {"release": True}))
        torch.testing.assert_close(ported(x), want)
        torch.testing.assert_close(ported.bfloat16().float()(x), want)
        change(model[1])  # type: ignore[arg-type]
        with pytest.raises(xir.MismatchError, match=r"1\.weight was loaded into, or written to, in a model whose"):
            ported(x)


def test_what_a_port_reads_elsewhere_cannot_be_loaded_into_it(tmp_path: Path) -> None:
    """Nor before the first forward; other tensors can."""
    model = nn.Linear(2, 2)
    save_file({"weight": model.weight.detach()}, tmp_path / "model.safetensors")
    ported = xir.port(model, weights=tmp_path)
    ported.load_state_dict({"bias": torch.ones(2)}, strict=False)
    with pytest.raises(xir.MismatchError, match=r"weight was loaded into a port that reads it from weights="):
        ported.load_state_dict(model.state_dict())


class Tied(nn.Module):
    """Two layers with one weight, of which each rank holds all, or a part with the host."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.sigmoid(self.first(x)))


@pytest.mark.parametrize("options", [{"release": True}, {"stream_weights": True}], ids=str)
@pytest.mark.parametrize("named", [None, "first.weight", "last.weight"])
def test_a_tied_weight_stays_one(tmp_path: Path, named: str | None, options: dict[str, Any]) -> None:
    """When it was given up, for inputs of another shape, and where a checkpoint has it under one of its names only."""
    model, x = Tied().eval(), torch.randn(2, 8, 16)
    with torch.no_grad():
        want = [model(x), model(x[:1])]
        if named is not None:
            kept = {
                name: tensor
                for name, tensor in model.state_dict().items()
                if name in (named, "first.bias", "last.bias")
            }
            save_file(kept, tmp_path / "tied.safetensors")
            model = model.to("meta")
            model.last.weight = model.first.weight
            options = {**options, "weights": tmp_path}
        ported = xir.port(model, **options)
        torch.testing.assert_close([ported(x), ported(x[:1])], want)
    assert model.last.weight is model.first.weight and model.last.weight.is_meta


class Biased(nn.Module):
    """A layer whose bias a call may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, biased: bool = True) -> torch.Tensor:
        return self.last(x) if biased else nn.functional.linear(x, self.last.weight)


def test_what_is_stored_together_serves_calls_that_need_less() -> None:
    """What a model that was changed has elsewhere is named."""
    model, x = Biased().eval(), torch.randn(2, 8, 16)
    with torch.no_grad():
        want = [model(x), model(x, False)]
        ported = xir.port(model, stream_weights=True)
        torch.testing.assert_close([ported(x), ported(x, False)], want)
        model.last = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)).to("meta")
        with pytest.raises(
            xir.MismatchError, match=r"original\d has no values: the model is on the meta device, or gave"
        ):
            ported(x)


def test_what_a_stage_does_not_use_is_freed(saved: Saved) -> None:
    model, _ = models.load("flux.1-dev:tiny")
    parallel = xir.trace(model, saved[1]).parallelize(pipefusion=2)
    assert parallel.pipeline is not None
    names = parallel.pipeline.weights_of(1)
    living = {name: weakref.ref(tensor.untyped_storage()) for name, tensor in model.named_parameters()}
    held = WeightStore(model, CPU, release=True).take(names, parallel.original.state)
    assert {name for name, ref in living.items() if ref() is not None} <= set(names)
    assert len(held.fetch()) == len(names) < len(living)
    with pytest.raises(xir.MismatchError, match="gave it up"):
        WeightStore(model, CPU, release=True).take(names, parallel.original.state)


def test_resident_memory_grows_by_what_is_read(tmp_path: Path) -> None:
    """By a rank's own tensors and at most one more, whatever else the file has."""
    status = Path("/proc/self/status")

    def resident(kind: str) -> float:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(kind)) / 1024

    save_file(
        {f"layer{place}": torch.full((1 << 22,), float(place)) for place in range(12)}, tmp_path / "a.safetensors"
    )
    gc.collect()
    spec, names = TensorSpec((1 << 22,), torch.float32), [f"layer{place}" for place in range(0, 12, 2)]
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    held = WeightStore(nn.Module(), CPU, Checkpoint(tmp_path)).take(names, dict.fromkeys(names, spec)).fetch()
    assert [tensor[-1].item() for tensor in held] == list(range(0, 12, 2))
    assert resident("VmHWM") - before <= (len(names) + 1) * 16 + 8, "MiB: tensors of 16 each"


INDEX = "model.safetensors.index.json"
ELSEWHERE = "expected the name of a file in"
ODD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "above": (lambda folder: "../x.safetensors", ELSEWHERE),
    "absolute": (lambda folder: str(folder.parent / "x.safetensors"), ELSEWHERE),
    "hidden": (lambda folder: "a/../../x.safetensors", ELSEWHERE),
    "NUL": (lambda folder: "x\0.safetensors", ELSEWHERE),
    "number": (lambda folder: 3, ELSEWHERE),
    "pipe": (lambda folder: os.mkfifo(folder / "f") or "f", "f is no file"),
    "folder": (lambda folder: (folder / "f").mkdir() or "f", "f is no file"),
    "device": (lambda folder: (folder / "f").symlink_to("/dev/zero") or "f", "f is no file"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_index_names_files_beside_it_only(name: str, tmp_path: Path) -> None:
    model, folder = nn.Linear(2, 2), tmp_path / "model"
    folder.mkdir()
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    file, message = ODD[name]
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(model.state_dict(), file(folder))}))
    refused(folder, message)


@pytest.mark.parametrize("listed", [[], "x", None, 1])
def test_an_index_has_a_map(listed: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    refused(tmp_path, "is not an index")


def test_an_index_that_is_no_file_or_endless_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("[" * 100_000)
    refused(tmp_path, "is not an index")
    (tmp_path / INDEX).unlink()
    os.mkfifo(tmp_path / INDEX)
    refused(tmp_path, "is no file")
    refused(tmp_path / INDEX, "is no file")
    refused(Path("/dev/zero"), "is no file")


def refused(weights: Path, message: str) -> None:
    start = time.perf_counter()
    with torch.no_grad(), pytest.raises(xir.MismatchError, match=message):
        xir.port(nn.Linear(2, 2, device="meta"), weights=weights)(torch.ones(1, 2))
    assert time.perf_counter() - start < 5


def test_an_input_without_values_is_refused() -> None:
    with torch.no_grad(), pytest.raises(xir.MismatchError, match="input is on the meta device"):
        xir.port(nn.Linear(2, 2))(torch.ones(1, 2, device="meta"))
