"""Seats of a server kept by actors of a Ray cluster: Ray finds a place for each, and another one when it is lost."""

from __future__ import annotations

import logging
from typing import Any

import ray

from xdit_ir.errors import ServingError
from xdit_ir.serving.hosts import Seat, Way, sit

HOST = 1
"""That of all seats, as the server counts: none is on its own."""
# So that ranks of one host reach each other's memory; which GPU is whose is told to them.
ALL_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}


class Keeper:
    """An actor; its rank is a process below it, as that is sooner there again."""

    def node(self) -> str:
        """The host it is on."""
        return str(ray.util.get_node_ip_address())

    def keep(self, way: Way, seat: Seat) -> None:
        """Until the server sends it home."""
        gpus = ray.get_gpu_ids()
        while sit(way, seat, int(gpus[0]) if gpus else None):
            pass


class Actors:
    """Those of a server; `hosts` of each, in the order of the ranks."""

    def __init__(self, count: int, address: str, device: str | None, start: float) -> None:
        ray.init(address=address or None, logging_level=logging.WARNING)
        gpus = device == "cuda" or (device is None and "GPU" in ray.cluster_resources())
        self.address = str(ray.util.get_node_ip_address())
        options = {"num_cpus": 1, "num_gpus": int(gpus), "max_restarts": -1, "max_task_retries": -1}
        keeper: Any = ray.remote(Keeper).options(runtime_env=ALL_GPUS, **options)
        made = [keeper.remote() for _ in range(count)]
        try:
            nodes = ray.get([one.node.remote() for one in made], timeout=start)
        except ray.exceptions.GetTimeoutError as error:
            there = {name: size for name, size in ray.cluster_resources().items() if name in ("CPU", "GPU")}
            ray.shutdown()
            wanted = f"{count} actors with a CPU{' and a GPU' if gpus else ''} each"
            raise ServingError(f"Ray did not start {wanted} within {start:g} s; it has {there}") from error
        # Ranks are numbered host by host, so that inner degrees stay inside.
        found = sorted(zip(nodes, made, strict=True), key=lambda pair: pair[0])
        self.hosts, self._actors = [node for node, _ in found], [actor for _, actor in found]

    def keep(self, way: Way) -> None:
        """All take their seats."""
        self._kept = [actor.keep.remote(way, (HOST, place)) for place, actor in enumerate(self._actors)]

    def close(self) -> None:
        """When the server has sent them home."""
        ray.wait(self._kept, num_returns=len(self._kept), timeout=10)
        # They end by themselves, and leave nothing: one that is ended by Ray leaves the folders of its rank's sockets.
        ended = [actor.__ray_terminate__.remote() for actor in self._actors]
        ray.wait(ended, num_returns=len(ended), timeout=10)
        ray.shutdown()
