"""What has no text of its own: large tensors by the hash of their contents, opaque objects by a name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from xdit_ir.errors import ParseError

INLINE = 64  # elements up to which a tensor is written out


def digest(tensor: torch.Tensor) -> str:
    """A hash of shape, dtype and contents; equal for equal bits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    contents = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    about = f"{tensor.dtype}{list(tensor.shape)}".encode()
    return "sha256:" + hashlib.sha256(about + contents).hexdigest()[:32]


class Collected:
    """What a text refers to, by the key under which it does."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._keys: dict[int, str] = {}

    def tensor(self, tensor: torch.Tensor) -> str:
        """The key of a tensor."""
        key = digest(tensor)
        self.found.setdefault(key, tensor)
        return key

    def object(self, item: Any) -> str:
        """The key of any other object: its kind and a number."""
        if id(item) not in self._keys:
            kind = getattr(item, "__name__", type(item).__name__)
            self._keys[id(item)] = key = f"{kind}.{len(self._keys)}"
            self.found[key] = item
        return self._keys[id(item)]


def attached(attachments: Mapping[str, Any], key: str, line: int) -> Any:
    """The attachment that a text refers to; a tensor's contents must be those that the text was written for."""
    if key not in attachments:
        raise ParseError(
            f"line {line}: the text refers to {key}, which is not among its {len(attachments)} attachments"
        )
    item = attachments[key]
    if key.startswith("sha256:") and digest(item) != key:
        raise ParseError(f"line {line}: the attachment {key} has other contents: {digest(item)}")
    return item
