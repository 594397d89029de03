"""What a call leaves in the lists that it is given, such as the features that a decoder keeps for its next frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.capture.failures import Unshareable
from xdit_ir.capture.objects import ClassMark, expand_objects
from xdit_ir.reflection.atoms import is_plain_object

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Holder = tuple[list[Any], int]


def left_behind(leaves: Sequence[Any], spec: pytree.TreeSpec, arguments: Arguments) -> dict[int, Any]:
    """The entries of lists among the arguments of a call that are not the `leaves` that they were before it, by place.

    Raises:
        Unshareable: something else has changed.
    """
    after, now = pytree.tree_flatten(expand_objects(arguments))
    if now != spec:
        raise Unshareable("changes the lengths of lists, or the keys of dicts, that it is given")
    pairs = zip(leaves, after, strict=True)
    found = {place: new for place, (old, new) in enumerate(pairs) if not _same_leaf(new, old)}
    if found:
        holders(arguments, found)
    return found


def holders(arguments: Arguments, places: Mapping[int, Any], module: nn.Module | None = None) -> dict[int, Holder]:
    """The lists among arguments, and the indices, where the leaves at these places are.

    Raises:
        Unshareable: one is in no list, or in one that is given twice, or that `module` has, too: a body that is traced
            with lists of its own would not see what it writes there.
    """
    paths, _ = pytree.tree_flatten_with_path(expand_objects(arguments))
    given = [id(one) for one in _lists(arguments)]
    owned = {id(item) for one in (module.modules() if module is not None else ()) for item in vars(one).values()}
    found = {place: _holder(arguments, paths[place][0]) for place in places}
    for held, _ in found.values():
        if given.count(id(held)) > 1 or id(held) in owned:
            raise Unshareable("writes to a list that it is given twice, or that its module has")
    return found


def _holder(tree: Any, path: Sequence[Any]) -> Holder:
    for key in path[:-1]:
        if isinstance(key, pytree.SequenceKey) and type(tree) in (list, tuple):
            tree = tree[key.idx]
        elif isinstance(key, pytree.MappingKey) and type(tree) is dict:
            tree = tree[key.key]
        else:
            raise Unshareable("writes to an object that it is given")
    if type(tree) is not list:
        raise Unshareable("writes to an object that it is given")
    return tree, path[-1].idx


def _lists(tree: Any, above: tuple[int, ...] = ()) -> Iterator[list[Any]]:
    """Every list among arguments, in plain objects too, as often as it is there."""
    if type(tree) is list:
        yield tree
    entries: Iterable[Any] = ()
    if isinstance(tree, (list, tuple)):
        entries = tree
    elif isinstance(tree, Mapping):
        entries = tree.values()
    elif is_plain_object(type(tree)):
        entries = getattr(tree, "__dict__", {}).values()
    for entry in entries:
        if id(entry) not in above:
            yield from _lists(entry, (*above, id(tree)))


def _same_leaf(new: Any, old: Any) -> bool:
    return new is old or (isinstance(new, ClassMark) and new == old)
