"""Generators of random numbers among the arguments of forward."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from xdit_ir.errors import TraceError


class GivenGenerator(torch.Generator):
    """Stands for a generator while forward is traced: it has the device, and nothing can be learnt of its state, so
    that a program serves calls with any other. Raises `TraceError` where the state is read or set; operators that draw
    from it raise when they are recorded."""

    def _refused(self, *_: Any, **__: Any) -> NoReturn:
        raise TraceError("forward reads the state of a torch.Generator that it is given; draw outside, pass the noise")

    get_state = set_state = clone_state = graphsafe_get_state = graphsafe_set_state = _refused
    seed = initial_seed = manual_seed = get_offset = set_offset = __reduce_ex__ = _refused


def given_generator(leaf: Any) -> Any:
    """What forward is given for an argument; anything but a generator is itself."""
    return GivenGenerator(leaf.device) if type(leaf) is torch.Generator else leaf
