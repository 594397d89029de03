"""Machines that `xdit-ir calibrate` has measured: files like those that are kept, in a folder of the user's."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def folder() -> Path:
    """Where they are, as the XDG base directories have it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xdit-ir" / "machines"


def device_name(device: torch.device) -> str:
    """What a GPU is called by PyTorch; `cpu` for CPUs."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def file_name(device: str) -> str:
    """Of the machine with such a GPU, or with CPUs."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-measured.toml"


class Draft:
    """The figures of a machine that is being measured; those that are not yet are of one that is `like` it."""

    def __init__(self, like: Mapping[str, Any], named: str, title: str, device: str, source: str) -> None:
        self.data: dict[str, Any] = copy.deepcopy(dict(like))
        self.data |= {"title": title, "devices": [device]}
        self._source = source
        for name, said in self.data["sources"].items():
            self.data["sources"][name] = f"not measured; of {named}: {said}"

    def take(self, figures: Mapping[str, Any], how: str) -> None:
        """Figures that were measured, or follow from those."""
        for name, value in figures.items():
            place = self.data if name in self.data else self.data["kernels"]
            place[name] = value
            self.data["sources"][name] = f"{self._source}: {how}"

    def text(self) -> str:
        """As a file."""
        return to_toml(self.data)


def to_toml(data: Mapping[str, Any]) -> str:
    """Of plain values, mappings of those, and lists of such mappings."""
    tables = {name: value for name, value in data.items() if isinstance(value, Mapping) or _is_tables(value)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in data.items() if name not in tables]
    for name, value in tables.items():
        one = isinstance(value, Mapping)
        for table in [value] if one else value:
            lines += ["", f"[{name}]" if one else f"[[{name}]]"]
            lines += [f"{key} = {json.dumps(item)}" for key, item in table.items()]
    return "\n".join(lines) + "\n"


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
