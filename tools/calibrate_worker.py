"""One process of `xdit-ir calibrate`: rank 0 measures kernels and writes the machine, all measure exchanges."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xdit_ir.planning import measured
from xdit_ir.planning.hardware import CPU, GIB, hardware_named, kept_data
from xdit_ir.tools import calibrate_kernels as kernels
from xdit_ir.tools import calibrate_links as links
from xdit_ir.tools.calibrate_kernels import Bench


def main() -> None:
    """Measure, under torchrun or alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    local = os.environ.get("LOCAL_RANK", "0")
    device = torch.device(f"cuda:{local}" if args.device == "cuda" else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        limit = datetime.timedelta(minutes=5)
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=limit, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=limit)
    with torch.inference_mode():
        calibrate(device, args.output, time.monotonic() + args.seconds)
    sys.stdout.flush()
    os._exit(0)  # a rank that failed in an exchange would be waited for when process groups are destroyed


def calibrate(device: torch.device, output: Path, deadline: float, least: float = 0.3) -> None:
    """Collective, if there is a process group: each of them calls it."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    first = ranks == 1 or dist.get_rank() == 0
    bench = Bench(device, _say if first else _quiet, least if device.type == "cuda" else least / 10)
    measuring = Calibration(bench, ranks, output, deadline)
    if first:
        measuring.kernels()
    if ranks > 1:
        dist.barrier()
        measuring.links(first)
    if first:
        measuring.compiled()


def _say(text: str) -> None:
    print(text, flush=True)


def _quiet(text: str) -> None:
    pass


@dataclass
class Calibration:
    """Of one machine; the file is written anew after each part, with what is known by then."""

    bench: Bench
    ranks: int
    output: Path
    deadline: float

    def __post_init__(self) -> None:
        device = self.bench.device
        name = measured.device_name(device)
        self.like = CPU if device.type == "cpu" else hardware_named(name).name
        today, gpus = datetime.date.today().isoformat(), f"{self.ranks} processes with {name}"
        source = f"measured by xdit-ir calibrate on {today}, torch {torch.__version__}"
        self.draft = measured.Draft(kept_data(self.like), self.like, f"{name}, measured", name, source)
        self.bench.say(f"{gpus}; what cannot be measured is taken of {self.like}")
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory / GIB
            self.draft.take({"gib": round(total, 1)}, "total_memory of the device")

    def kernels(self) -> None:
        """On this process alone."""
        self._take(kernels.products, "products of several shapes, each over and over")
        self._take(kernels.single, "a product of a large square")
        self._take(kernels.attention, "heads of 64 and of 128")
        self._take(kernels.memory, "a product of one row")
        if self.bench.gpu:
            self._flash()
            self._take(kernels.host, "a small product of a module, over and over")
        self._write()

    def compiled(self) -> None:
        """On this process alone, at last, as compiling takes a while."""
        self._take(kernels.fused, "norms with modulation and rotary positions, of several sizes")
        self._write()

    def links(self, first: bool) -> None:
        """On all processes; by copy engines, where these reach."""
        found = self._tried(links.collective)
        if self.bench.gpu:
            self._take(links.host_exchange, "small exchanges, over and over")
            found = self._tried(links.copy_engines) or found
        if found is not None and first:
            how = "copy engines" if found["hidden"] else "collectives"
            self.draft.take({"links": [found]}, f"all-to-alls of several sizes by {how}")
            self.bench.say(f"links = {found}")
            self._write()

    def _take(self, measure: Callable[[Bench], dict[str, float]], how: str) -> None:
        if (figures := self._tried(measure)) is not None:
            self.draft.take(figures, how)
            for name, value in figures.items():
                self.bench.say(f"{name} = {value:.4g}")

    def _tried(self, measure: Callable[[Bench], dict[str, Any]]) -> dict[str, Any] | None:
        """What it gives; nothing if it fails, or there is no time left for it."""
        late = torch.tensor(float(time.monotonic() > self.deadline), device=self.bench.device)
        if self.ranks > 1 and measure.__module__ == links.__name__:
            dist.all_reduce(late)
        if late:
            self.bench.say(f"{measure.__name__}: left out, there is no time left")
            return None
        try:
            return measure(self.bench)
        except Exception as error:  # whatever it is, the others are measured
            first = next(iter(str(error).splitlines()), "")
            self.bench.say(f"{measure.__name__}: not measured, {type(error).__name__}: {first}")
            return None

    def _flash(self) -> None:
        plain, mine = kept_data(self.like)["kernels"], self.draft.data["kernels"]
        if (found := self._tried(kernels.flash)) is not None:
            self.draft.take({"flash": found["flash"] * (1 + mine["width"] / 128)}, "heads of 128")
        else:
            speed = mine["attention"] * plain["flash"] / plain["attention"]
            self.draft.take({"flash": speed}, f"not by FlashAttention: attention, times the ratio of {self.like}")
        self.bench.say(f"flash = {mine['flash']:.4g}")

    def _choices(self) -> None:
        """What passes choose with are averages: as much of the measured speeds as of those of the machine that is like
        this; on a CPU programs are tried out as GPUs run them."""
        like, mine = kept_data(self.like), self.draft.data
        if self.bench.gpu:
            link, plain = mine["links"][0], like["links"][0]
            ratios = {
                "flops": mine["kernels"]["products"] / like["kernels"]["products"],
                "memory": mine["kernels"]["fused"] / like["kernels"]["fused"],
                "bytes": link["bytes"] / plain["bytes"],
                "latency": link["latency"] / plain["latency"],
            }
            choices = {name: speed * ratios.get(name, 1.0) for name, speed in like["choices"].items()}
            self.draft.take({"choices": choices}, f"those of {self.like}, times what was measured here over its speeds")

    def _write(self) -> None:
        self._choices()
        self.output.parent.mkdir(parents=True, exist_ok=True)
        new = self.output.with_suffix(".new")
        new.write_text(self.draft.text(), encoding="utf-8")
        new.replace(self.output)


if __name__ == "__main__":
    main()
