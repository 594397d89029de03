"""What `port` itself costs a call: `python benchmarks/host_time.py`.

The denoiser of FLUX.1-dev with all of its 57 layers, narrow, on one rank. The program that a call runs is taken out, so
that what is timed is what is done besides: finding the device, checking that the model, its code and the arguments are
those that the program was made for, and collecting weights. Prints the median of calls and the quartiles, in
milliseconds of one thread, and what the parts take.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from timing import quartiles

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.models.build import build
from xdit_ir.porting.arguments import Arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=500)
    calls = parser.parse_args().calls
    entry = models.entry("flux.1-dev")
    deep = {**entry.tiny, **{name: entry.full[name] for name in ("num_layers", "num_single_layers")}}
    model = build(entry.cls, deep, torch.device("cpu"), torch.float32)
    example = models.load("flux.1-dev:tiny")[1]
    ported = xir.port(model)
    with torch.no_grad():
        ported(**example)
        made = ported._xdit_specialisations
        [one] = made.found
        one.runner.run = lambda *_: None  # type: ignore[method-assign]
        parts: dict[str, Callable[[], Any]] = {
            "a call": lambda: ported(**example),
            "  the device": lambda: made.options.loading.device(model, inputs=example.values()),
            "  settings of the model": one.settings.unchanged,
            "  arguments and weights": lambda: one.runner.bind((), example),
            "  the search": lambda: made._find(one.mode, Arguments((), example)),
        }
        for name, call in parts.items():
            lower, median, upper = quartiles(call, calls, 1e6)
            print(f"{name:26s} {median:6.3f} ms ({lower:.3f} .. {upper:.3f})")


if __name__ == "__main__":
    main()
