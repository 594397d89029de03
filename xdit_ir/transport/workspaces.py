"""Workspaces in symmetric memory that the programs of several shapes share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from xdit_ir.transport.release import Release, Waits


@dataclass(eq=False)
class Workspaces:
    """Those of one model on one rank, by process group: each program uses one that is large enough.

    What a program proves of its slots says nothing of those of another. So ranks meet where another one begins.
    """

    device: torch.device
    release: Release
    _opened: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    _last: dict[int, object] = field(default_factory=dict)
    _waits: list[Waits] = field(default_factory=list)

    def take(self, nbytes: int, group: str) -> torch.Tensor:
        """A workspace of at least this size on every member of a group, which must all call this."""
        opened = self._opened.setdefault(group, [])
        found = next((one for one in opened if one.numel() >= nbytes), None)
        if found is None:
            largest = max((one.numel() for one in opened), default=0)
            found = self._open(max(nbytes, largest * 3 // 2), group)  # so that there are few, though sizes grow slowly
            opened.append(found)
        return found

    def enter(self, workspace: torch.Tensor, group: str, user: object) -> None:
        """`user` begins to use a workspace; all members call this in the order in which they run programs."""
        last = self._last.get(id(workspace))
        if last is not None and last is not user:
            self._meet(workspace, group)
        self._last[id(workspace)] = user

    def _open(self, nbytes: int, group: str) -> torch.Tensor:
        from xdit_ir.transport.peer_ops import open_workspace, symmetric  # registers operators

        workspace = open_workspace(nbytes, self.device, group)
        self._waits.append(Waits(symmetric(workspace, group), self.device))
        self.release.watch(self._waits[-1])
        return workspace

    def _meet(self, workspace: torch.Tensor, group: str) -> None:
        from xdit_ir.transport.peer_ops import meet

        meet(workspace, group)
