"""State of objects of libraries that shows in no attribute: generators of random numbers, arrays, files in memory."""

from __future__ import annotations

import array
import ctypes
import io
import pickle
import queue
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_SIMPLE: Any = getattr(ctypes, "_SimpleCData")  # noqa: B009
DRAWN = (random.Random, np.random.RandomState, np.random.Generator, torch.Generator)
# Drawn from by functions of their modules, and watched otherwise.
_SHARED = frozenset({id(getattr(random, "_inst", None)), id(getattr(np.random.mtrand, "_rand", None))})


def _put_array(item: Any, state: Any) -> None:
    item[:] = array.array(state[0], state[1])


def _put_memory(item: memoryview, state: bytes) -> None:
    if not item.readonly:
        item.cast("B")[:] = state


def _put_file(item: Any, state: Any) -> None:
    item.seek(0)
    item.truncate()
    item.write(state[0])
    item.seek(state[1])


def _numpy(item: Any) -> Any:
    return _bits(item).state


def _put_numpy(item: Any, state: Any) -> None:
    _bits(item).state = state


def _torch(item: torch.Generator) -> bytes:
    storage = torch.Generator.get_state(item).untyped_storage()  # a pickled tensor has its address
    return bytes(storage.tolist())  # type: ignore[no-untyped-call]


def _put_torch(item: torch.Generator, state: bytes) -> None:
    torch.Generator.set_state(item, torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _bits(item: Any) -> Any:
    return getattr(item, "bit_generator", item)


def _put_ctypes(item: Any, state: bytes) -> None:
    ctypes.memmove(ctypes.addressof(item), state, len(state))


_Kind = tuple[type | tuple[type, ...], Callable[[Any], Any], Callable[[Any, Any], Any]]
_KINDS: tuple[_Kind, ...] = (
    (random.Random, random.Random.getstate, random.Random.setstate),
    (np.random.RandomState, np.random.RandomState.get_state, np.random.RandomState.set_state),
    ((np.random.Generator, np.random.BitGenerator), _numpy, _put_numpy),
    (torch.Generator, _torch, _put_torch),
    (array.array, lambda item: (item.typecode, item.tobytes()), _put_array),
    (memoryview, memoryview.tobytes, _put_memory),
    ((io.BytesIO, io.StringIO), lambda item: (item.getvalue(), item.tell()), _put_file),
    ((_SIMPLE, ctypes.Array, ctypes.Structure, ctypes.Union), bytes, _put_ctypes),
    (queue.SimpleQueue, queue.SimpleQueue.qsize, lambda item, state: None),
)
HIDING: tuple[type, ...] = tuple(
    kind for kinds, *_ in _KINDS for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
)


def hides(item: Any) -> bool:
    """Whether an object has such a state, that is its own."""
    return isinstance(item, HIDING) and id(item) not in _SHARED and item is not torch.default_generator


def hidden_state(item: Any) -> bytes:
    """The state, comparable."""
    return pickle.dumps(next(read(item) for kinds, read, _ in _KINDS if isinstance(item, kinds)))


def put_hidden_state(item: Any, state: bytes) -> None:
    """Make it what it was."""
    next(put for kinds, _, put in _KINDS if isinstance(item, kinds))(item, pickle.loads(state))
