"""Types with their layouts as text, and back.

`256/ulysses` is read as the obvious division: even, even within segments `(16+256)/ulysses`, in runs of the sizes
given `[86,85,85]`. A partition that is not the one so read is told by a number, `256/ulysses#1`, and listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from xdit_ir.errors import ParseError
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.printer import dimension_text, mesh_text, partial_text
from xdit_ir.ir.program import TensorSpec
from xdit_ir.text.literals import dtype_text, read_dtype
from xdit_ir.text.scanner import Scanner

LARGEST = 1 << 24  # indices of a divided dimension; some rules list them
OVER = r"\(?\w+(?:\*\w+)*\)?"


class TypeWriter:
    """Types as text; numbers the partitions that their text does not determine."""

    def __init__(self, mesh: Mesh | None) -> None:
        self.mesh = mesh
        self.numbers: dict[Partition, int] = {}
        self._texts: dict[Partition, str] = {}

    def __call__(self, spec: Any, layout: Any) -> str:
        """`bf16[2, (512+4096)/ulysses, 3072]`; a tuple's types in parentheses."""
        if isinstance(spec, TensorSpec):
            return self._tensor(spec, layout)
        layouts = layout or [None] * len(spec)
        return f"({', '.join(self(s, where) for s, where in zip(spec, layouts, strict=True))})"

    def _tensor(self, spec: TensorSpec, layout: Layout | None) -> str:
        dims = layout.dims if layout is not None else (None,) * len(spec.shape)
        texts = (str(n) if dim is None else self._dimension(dim) for n, dim in zip(spec.shape, dims, strict=True))
        partial = "" if layout is None or self.mesh is None else partial_text(layout, self.mesh)
        return f"{dtype_text(spec.dtype)}[{', '.join(texts)}]{partial}"

    def _dimension(self, partition: Partition) -> str:
        assert self.mesh is not None
        if partition not in self._texts:
            text = dimension_text(self.mesh, partition.size, partition)
            if obvious(text, self.mesh) != partition:
                text += f"#{self.numbers.setdefault(partition, len(self.numbers))}"
            self._texts[partition] = text
        return self._texts[partition]


def obvious(text: str, mesh: Mesh) -> Partition | None:
    """The partition that the text of a dimension means, if it is one of the usual ones."""
    found = re.fullmatch(r"(\d+|\([\d+]+\))/(.+?)(?:\[([\d,]+)\])?", text)
    if found is None or "+halo" in text:
        return None
    segments = [int(size) for size in found[1].strip("()").split("+")]
    dims = found[2].strip("()").split("*")
    if any(mesh.degrees.get(dim, 1) == 1 for dim in dims):
        return None
    even = mesh.divide(sum(segments), dims, segments=segments)
    if found[3] is None or len(segments) > 1:
        return even
    return _runs(sum(segments), [int(size) for size in found[3].split(",")], mesh, dims)


def _runs(size: int, lengths: list[int], mesh: Mesh, dims: list[str]) -> Partition | None:
    if len(lengths) != mesh.size(dims) or sum(lengths) != size:
        return None
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    pieces = [Indices.range(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    return Partition(size, tuple(pieces[mesh.index(rank, dims)] for rank in range(mesh.world_size)))


def partition_text(partition: Partition) -> str:
    """`272 = 0:8 16:144 | 8:16 144:272`: for every rank its runs, in order."""
    parts = (" ".join(f"{start}:{start + n}" for start, n in part.runs) or "-" for part in partition.parts)
    return f"{partition.size} = {' | '.join(parts)}"


def read_partition(scanner: Scanner) -> Partition:
    """The inverse of `partition_text`."""
    size = int(scanner.expect(r"\d+", "a size"))
    scanner.need("=")
    parts = [_read_part(scanner)]
    while scanner.take("|"):
        parts.append(_read_part(scanner))
    return Partition(size, tuple(parts))


def _read_part(scanner: Scanner) -> Indices:
    if scanner.take("-"):
        return Indices(())
    runs: list[tuple[int, int]] = []
    while True:
        run = scanner.match(r"\d+:\d+")
        if run is None:
            return Indices.of_runs(runs) if runs else scanner.fail("runs, such as 0:8, or -")
        start, stop = map(int, run.split(":"))
        runs.append((start, stop - start))


class TypeReader:
    """Types and layouts from text, on this mesh, with these numbered partitions."""

    def __init__(self, mesh: Mesh | None, partitions: Mapping[int, Partition]) -> None:
        self.mesh, self.partitions = mesh, partitions

    def __call__(self, scanner: Scanner) -> tuple[Any, Any]:
        """A `TensorSpec` with its `Layout` (None without a mesh), or tuples of both."""
        if not scanner.take("("):
            return self._tensor(scanner)
        pairs = []
        while not scanner.take(")"):
            pairs.append(self(scanner))
            if not scanner.take(","):
                scanner.need(")")
                break
        layouts = tuple(layout for _, layout in pairs)
        return tuple(spec for spec, _ in pairs), layouts if self.mesh is not None else None

    def _tensor(self, scanner: Scanner) -> tuple[TensorSpec, Layout | None]:
        dtype = read_dtype(scanner)
        scanner.need("[")
        shape: list[int] = []
        dims: list[Partition | None] = []
        while not scanner.take("]"):
            size, partition = self._dimension(scanner)
            shape.append(size)
            dims.append(partition)
            if not scanner.take(","):
                scanner.need("]")
                break
        partial = scanner.match(r"partial\([\w, ]+\)")
        names = frozenset(re.findall(r"\w+", partial)[1:]) if partial else frozenset[str]()
        spec = TensorSpec(tuple(shape), dtype)
        return spec, None if self.mesh is None else Layout(tuple(dims), names)

    def _dimension(self, scanner: Scanner) -> tuple[int, Partition | None]:
        text = scanner.expect(rf"(?:\d+|\([\d+]+\))(?:~reordered|/{OVER}(?:\+halo|\[[\d,]+\])?)?", "a dimension")
        text = text.rstrip()
        if scanner.take("#"):
            number = int(scanner.expect(r"\d+", "the number of a partition"))
            if number not in self.partitions:
                raise ParseError(f"line {scanner.line}: partition #{number} is not listed in the text")
            return self._listed(scanner, self.partitions[number])
        if text.isdigit():
            return int(text), None
        if self.mesh is None:
            raise ParseError(
                f"line {scanner.line}: {text} is divided, but the program is on no mesh: `program X on ...`"
            )
        found = obvious(text, self.mesh) if sum(map(int, re.findall(r"\d+", text.split("/")[0]))) <= LARGEST else None
        if found is None:
            on = mesh_text(self.mesh)
            raise ParseError(
                f"line {scanner.line}: {text} says no exact partition on {on}; number one: {text}#0, and list it"
            )
        return found.size, found

    def _listed(self, scanner: Scanner, partition: Partition) -> tuple[int, Partition]:
        """A numbered partition, which must be one for all ranks of the mesh."""
        ranks = 0 if self.mesh is None else self.mesh.world_size
        if len(partition.parts) != ranks or max(partition.size, *partition.sizes) > LARGEST:
            raise ParseError(
                f"line {scanner.line}: the partition has {len(partition.parts)} parts of {partition.size} indices; "
                f"expected one for each of {ranks} ranks, and {LARGEST} indices at most"
            )
        return partition.size, partition
