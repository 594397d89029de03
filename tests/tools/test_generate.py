"""`xdit-ir generate` and `xir.generate` on one process: files, phases, options, and every error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import xdit_ir as xir
from xdit_ir.generation import files
from xdit_ir.generation.folder import Checkpoint, checked_dtypes, load
from xdit_ir.generation.job import check_distinct
from xdit_ir.generation.request import dealt, parse_size, read_embeddings
from xdit_ir.ir.mesh import Mesh
from xdit_ir.models import digits
from xdit_ir.porting.ported import Ported
from xdit_ir.tools.cli import main
from xdit_ir.transport.distributed import check_processes

Capture = pytest.CaptureFixture[str]
OPTIONS: dict[str, Any] = {"width": 128, "height": 128, "steps": 2, "arguments": {"use_resolution_binning": False}}
CALL = ["--size", "128x128", "--steps", "2", "--set", "use_resolution_binning=false"]
PROMPT = "a lighthouse at dusk"


def by_hand(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The image that the pipeline itself makes."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    shape = {"width": 128, "height": 128, "num_inference_steps": 2, "use_resolution_binning": False}
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **shape).images[0]


def close(got: Any, want: Any, steps: int = 1) -> None:
    got, want = np.array(got).astype(int), np.array(want).astype(int)
    assert got.shape == want.shape and want.std() > 10
    assert abs(got - want).max() <= steps


def test_the_command_writes_the_image_of_the_pipeline(pipeline_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    output = ["--output", str(tmp_path), "--benchmark", "2"]
    assert main(["generate", str(pipeline_folder), "--prompt", PROMPT, *CALL, *output]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.png", "generate.json"]
    close(Image.open(tmp_path / "0000.png"), by_hand(pipeline_folder))
    out = capsys.readouterr().out
    assert str(tmp_path / "0000.png") in out and "denoise" in out and "total: median" in out
    report = json.loads((tmp_path / "generate.json").read_text())
    assert report["weights"] == "read by each rank" and report["files"] == ["0000.png"]
    assert list(report["phases"]) == ["load", "port", "encode", "denoise", "decode"]
    assert all(phase["seconds"] > 0 and phase["host_gib"] > 0.05 for phase in report["phases"].values())
    bench = report["benchmark"]
    assert len(bench["runs"]) == 2 and list(bench["seconds"]) == ["encode", "denoise", "decode", "total"]
    for times in bench["seconds"].values():
        assert 0 < times["min"] <= times["median"] <= times["max"]


def test_a_step_cache_says_how_many_calls_it_left_out(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path), "--cache", "every:2", "--trim-padding", "64"]
    assert main(["generate", str(pipeline_folder), "--prompt", PROMPT, *CALL, *output]) == 0
    report = json.loads((tmp_path / "generate.json").read_text())
    assert report["caches"] == [{"rule": "every:2", "calls": 2, "skipped": 1}]
    assert "cache every:2: 1 of 2 calls reused" in capsys.readouterr().out
    assert np.array(Image.open(tmp_path / "0000.png")).std() > 10


def test_a_given_pipeline_is_ported_once(pipeline_folder: Path) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder)
    decode = pipe.vae.decode
    first = xir.generate(pipe, PROMPT, **OPTIONS)
    assert isinstance(pipe.transformer, Ported) and first.pipe is pipe and first.files == []
    again = xir.generate(pipe, [PROMPT, "a cat"], **OPTIONS, offload=True)
    close(first.results[0][0], by_hand(pipeline_folder))
    close(again.results[0][0], first.results[0][0])
    assert abs(np.array(again.results[1][0]).astype(int) - np.array(first.results[0][0])).max() > 1
    assert len(pipe.transformer.programs) == 1 and pipe.vae.decode == decode
    with pytest.raises(xir.ParallelizeError, match="ported already"):
        xir.generate(pipe, PROMPT, ulysses=1, **OPTIONS)


def test_what_is_no_dtype(pipeline_folder: Path) -> None:
    assert checked_dtypes("bf16") is torch.bfloat16 and checked_dtypes(None) is None
    assert checked_dtypes("bf16,vae=fp32") == {"default": torch.bfloat16, "vae": torch.float32}
    for given in ("int8", torch.int8, 3, {"vae": "bf16"}):
        with pytest.raises(xir.GenerationError, match=r"dtype.*: expected .*bf16"):
            xir.generate(pipeline_folder, PROMPT, dtype=given, **OPTIONS)


def test_dtypes(pipeline_folder: Path, tmp_path: Path) -> None:
    """Read by each rank, weights have the dtypes that `from_pretrained` gives them; a mixture is refused by name."""
    want = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder, dtype=torch.bfloat16).transformer
    bare = load(pipeline_folder, torch.bfloat16).pipe.transformer
    kinds = {name: tensor.dtype for name, tensor in bare.state_dict().items()}
    assert kinds == {name: tensor.dtype for name, tensor in want.state_dict().items()}
    assert all(tensor.is_meta for tensor in bare.parameters()) and not bare.training
    made = xir.generate(pipeline_folder, PROMPT, dtype=torch.bfloat16, **OPTIONS)
    close(made.results[0][0], by_hand(pipeline_folder, torch.bfloat16), 16)
    mixed = shutil.copytree(pipeline_folder, tmp_path / "mixed")
    diffusers.DiffusionPipeline.from_pretrained(mixed).text_encoder.bfloat16().save_pretrained(mixed / "text_encoder")
    named = "different dtypes: text_encoder bfloat16, transformer float32"
    with pytest.raises(xir.GenerationError, match=named):
        xir.generate(mixed, PROMPT, **OPTIONS)
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder)
    pipe.text_encoder.bfloat16()
    with pytest.raises(xir.GenerationError, match=named):
        xir.generate(pipe, PROMPT, **OPTIONS)
    close(
        xir.generate(pipe, PROMPT, dtype=torch.float32, **OPTIONS).results[0][0],
        by_hand(pipeline_folder),
        16,
    )


def test_a_pipeline_without_prompts(tmp_path: Path, capsys: Capture) -> None:
    folder, wanted = str(digits.PIPELINE), ["--set", "class_labels=[3, 7]", "--steps", "5", "--guidance", "2"]
    assert main(["generate", folder, *wanted, "--dtype", "fp32", "--output", str(tmp_path)]) == 0
    pixels = [np.array(Image.open(tmp_path / f"0000-{place}.png")) for place in (0, 1)]
    images = torch.from_numpy(np.stack(pixels))[:, None] / 255
    assert digits.load_classifier().accuracy(images, torch.tensor([3, 7])) == 1.0
    capsys.readouterr()
    assert main(["generate", folder]) == 2
    assert "expected --prompt, --prompts, --embeddings, or --set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{}x", "--prompt", "a"], "there is no folder {}x; did you mean {}?"),
        (["{}/transformer", "--prompt", "a"], "{}/transformer has no model_index.json; did you mean {}?"),
        (["{}", "--prompt", "a", "--ulysses", "2"], "needs 2 processes, this job has 1; nearest legal: ulysses=1"),
        (["{}", "--prompt", "a", "--ulysses", "0"], "ulysses=0 is not a positive integer"),
        (["{}", "--prompt", "a", "--data", "2"], "1 cannot be divided evenly; nearest legal: data=1, or 2 prompts"),
        (["{}", "--prompt", "a", "--prompt", "b", "--data", "2"], "this job has 1; nearest legal: data=1, or start 2"),
        (["{}", "--prompt", "a", "--device", "cuda"], "rank 0 sees no GPU"),
        (["{}", "--prompt", "a", "--size", "128x132"], "PixArtSigmaPipeline refuses its arguments: `height` and"),
        (["{}", "--prompt", "a", "--size", "big"], "size 'big': expected WIDTHxHEIGHT"),
        (["{}", "--prompt", "a", "--frames", "3"], "does not take frames (num_frames)"),
        (["{}", "--prompt", "a", "--set", "heigth=3"], "does not take heigth; the nearest that it takes is 'height'"),
        (["{}", "--prompt", "a", "--set", "height"], "--set height: expected NAME=VALUE"),
        (["{}", "--prompt", "a", "--image", "{}/no.png"], "no.png cannot be read"),
        (["{}", "--prompt", "a", "--dtype", "bf17"], "dtype 'bf17': expected one of bf16"),
        (["{}", "--prompt", "a", "--lora", "{}/no:0.5"], "cannot be loaded into PixArtSigmaPipeline"),
        (["{}", "--prompts", "{}/none.txt"], "prompts {}/none.txt cannot be read"),
        (["{}", "--embeddings", "{}/model_index.json"], "model_index.json cannot be read"),
        (["{}", "--prompt", "a", "--embeddings", "{}"], "expected no --prompt"),
    ],
)
def test_errors(pipeline_folder: Path, argv: list[str], said: str, capsys: Capture, tmp_path: Path) -> None:
    filled = [text.replace("{}", str(pipeline_folder)) for text in argv]
    assert main(["generate", *filled, *CALL[2:], "--output", str(tmp_path / "out")]) == 2
    assert said.replace("{}", str(pipeline_folder)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


DIGITS = ["generate", str(digits.PIPELINE), "--dtype", "fp32"]
FINE = ["--set", "class_labels=[3]", "--steps", "1"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*FINE, "--output", "/etc/hostname"], "output /etc/hostname cannot be written"),
        ([*FINE, "--output", "/proc/x"], "output /proc/x cannot be written"),
        ([*FINE, "--output", "/etc/hostname/x"], "cannot be written"),
        (["--set", "class_labels=[3", "--steps", "1"], "Pipeline "),
        (["--set", "class_labels=null", "--steps", "1"], "Pipeline "),
        (["--set", "class_labels=[99999]", "--steps", "1"], "Pipeline fails"),
        ([*FINE, "--steps", "0"], "steps=0 is not a positive integer; the nearest legal one is steps=1"),
        ([*FINE, "--fps", "0"], "fps=0 is not a positive integer"),
        ([*FINE, "--benchmark", "-1"], "benchmark=-1 is not a positive integer"),
        ([*FINE, "--seed", "-1"], "seed=-1: expected an integer from 0"),
        ([*FINE, "--seed", "1" + "0" * 30], "expected an integer from 0"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(argv: list[str], said: str, capsys: Capture, tmp_path: Path) -> None:
    output = [] if "--output" in argv else ["--output", str(tmp_path / "out")]
    assert main([*DIGITS, *argv, *output]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert "1/1 [" not in err or "--output" not in argv, "known before anything is computed"
    assert not (tmp_path / "out").exists()


def test_what_was_generated_is_kept_elsewhere_if_it_cannot_be_written(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "out" / "0000.png").mkdir(parents=True)
    assert main([*DIGITS, *FINE, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "what was generated is in" in said
    assert Path(said.strip().rpartition(" ")[2], "0000.png").is_file()


def test_ctrl_c_ends_quietly(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ported, "_xdit_forward", stopped)
    assert main([*DIGITS, *FINE, "--output", str(tmp_path)]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("index", ["[" * 100_000, "[1]", "3", "{"])
def test_an_odd_index_of_a_pipeline(index: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "model_index.json").write_text(index)
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "model_index.json cannot be read" in capsys.readouterr().err


def test_a_pipe_is_no_file_of_embeddings(tmp_path: Path, capsys: Capture) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert main([*DIGITS, "--embeddings", str(tmp_path / "pipe")]) == 2
    assert "pipe cannot be read: it is no file" in capsys.readouterr().err


def test_numbers_of_processes_prompts_and_gpus() -> None:
    check_processes(Mesh.of(cfg=2), 4, data=2)
    with pytest.raises(xir.ParallelizeError, match=r"cfg=2 x data=2 needs 4 .* has 6; nearest legal: data=3, or"):
        check_processes(Mesh.of(cfg=2), 6, data=2)
    assert [dealt("abcdef", group, 3) for group in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(xir.ParallelizeError, match="6 cannot be divided evenly; nearest legal: data=3, or 8 prompts"):
        dealt("abcdef", 0, 4)
    with pytest.raises(xir.ParallelizeError, match=r"stepz=3 is no .*did you mean steps=3\?"):
        xir.generate("a folder that is not there", "a lighthouse", stepz=3)
    with pytest.raises(xir.ParallelizeError, match="data=0 is not a positive integer"):
        dealt("ab", 0, 0)
    check_distinct(["GPU-a", "GPU-b"])
    with pytest.raises(
        xir.ParallelizeError, match=r"rank 2 has no GPU of its own: it shares GPU-a with rank 0; 3 .* 2"
    ):
        check_distinct(["GPU-a", "GPU-b", "GPU-a"])
    assert parse_size("1024x768") == (1024, 768)


def test_embeddings_are_named_by_argument(tmp_path: Path) -> None:
    tensors = {name: torch.full((2,), float(place)) for place, name in enumerate(["a.1", "a.0", "b", "a.10", "c.d"])}
    save_file(tensors, tmp_path / "some.safetensors")
    found = read_embeddings(tmp_path / "some.safetensors")
    assert sorted(found) == ["a", "b", "c.d"] and [one[0].item() for one in found["a"]] == [1, 0, 3]


def test_a_video_from_embeddings_with_an_adapter(pipeline_builders: dict[str, Any], tmp_path: Path) -> None:
    pipe, embeddings = pipeline_builders["build_video"]()
    make, layers = torch.Generator().manual_seed(3), dict[str, torch.Tensor]()
    for name, module in pipe.transformer.named_modules():
        if name.endswith("attn1.to_q"):
            layers[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=make)
            layers[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=make)
    save_file(layers, tmp_path / "pytorch_lora_weights.safetensors")
    size = {"width": 128, "height": 128, "frames": 5, "steps": 2, "embeddings": embeddings}
    plain = xir.generate(pipe, **size, output=tmp_path / "plain")
    [video] = plain.files
    assert video.suffix == (".mp4" if files.writes_mp4() else ".gif")
    if video.suffix == ".gif":
        assert Image.open(video).n_frames == 5 and Image.open(video).size == (128, 128)
    other, _ = pipeline_builders["build_video"]()
    adapted = xir.generate(other, **size, lora=[f"{tmp_path}:0.5"])
    other, _ = pipeline_builders["build_video"]()
    other.load_lora_weights(dict(layers), adapter_name="by hand")
    other.set_adapters("by hand", 0.5)
    want = xir.generate(other, **size)
    before, got, by_hand = (np.stack(one.results[0][0]).astype(int) for one in (plain, adapted, want))
    assert abs(got - by_hand).max() <= 1 and abs(got - before).max() > 4


def lose(name: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path)

    return apply


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


NAME = "transformer_blocks.0.attn1.to_q.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (Path.unlink, "is missing"),
        (truncate, "is damaged or truncated"),
        (lose(NAME), f"has no tensor '{NAME}', though"),
    ],
)
def test_a_damaged_shard_is_named_and_can_be_mended(
    pipeline_folder: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    """Before anything is loaded, and, if the damage comes later, before any weight is read."""
    folder = shutil.copytree(pipeline_folder, tmp_path / "copy")
    shard = Checkpoint(folder / "transformer").files[NAME]
    whole = shard.read_bytes()
    pipe = load(folder).pipe
    xir.port(pipe, weights=folder)
    spoil(shard)
    for attempt in (lambda: load(folder), lambda: xir.generate(pipe, PROMPT, **OPTIONS)):
        with pytest.raises(xir.MismatchError) as caught:
            attempt()
        assert str(shard) in str(caught.value) and said in str(caught.value) and "tensor '" in str(caught.value)
    assert all(tensor.is_meta for tensor in pipe.transformer.parameters()) and pipe.transformer.programs == ()
    shard.write_bytes(whole)
    load(folder)
    close(xir.generate(pipe, PROMPT, **OPTIONS).results[0][0], by_hand(folder))


def test_a_tensor_that_the_index_lacks(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline_folder, tmp_path / "copy")
    pipe = load(folder).pipe
    xir.port(pipe, weights=folder)
    [index] = (folder / "transformer").glob("*.index.json")
    text = index.read_text()
    listed = json.loads(text)
    del listed["weight_map"][NAME]
    index.write_text(json.dumps(listed))
    for attempt in (lambda: load(folder), lambda: xir.generate(pipe, PROMPT, **OPTIONS)):
        with pytest.raises(xir.MismatchError, match=rf"{index.name} has no tensor '{NAME}' that the program needs"):
            attempt()
    index.write_text(text)
    assert len(xir.generate(pipe, PROMPT, **OPTIONS).results) == 1
