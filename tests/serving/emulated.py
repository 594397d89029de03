"""Two hosts on this one: network namespaces, and a cable between them that delays packets and loses some.

The cable is a thread that carries packets from one TUN device to the other: not every kernel has `tc`'s netem.
"""

from __future__ import annotations

import collections
import fcntl
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

DELAY, LOSS = 0.002, 0.005  # seconds each way, and part of the packets
TUNSETIFF, TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
PACKET = 65536
ENTER = 'hostname "$0" && exec "$@"'  # in a namespace of host names
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--master-port", "29400"]


class Unable(Exception):
    """Namespaces cannot be made here."""


class Cable(threading.Thread):
    """Between two TUN devices, which are there as long as it is."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(name="cable", daemon=True)
        self.ends = [_tun(name) for name in names]
        self.carried, self.lost, self.stopped = [0, 0], 0, False

    def run(self) -> None:
        chance, travelling = random.Random(0), collections.deque[tuple[float, int, bytes]]()
        while not self.stopped:
            due = travelling[0][0] - time.monotonic() if travelling else 0.1
            for end in select.select(self.ends, [], [], max(0.0, due))[0]:
                packet, place = os.read(end, PACKET), self.ends.index(end)
                self.carried[place] += len(packet)
                if chance.random() < LOSS:
                    self.lost += 1
                else:
                    travelling.append((time.monotonic() + DELAY, self.ends[1 - place], packet))
            while travelling and travelling[0][0] <= time.monotonic():
                _, end, packet = travelling.popleft()
                os.write(end, packet)

    def close(self) -> None:
        """Take it away."""
        self.stopped = True
        if self.is_alive():
            self.join()
        for end in self.ends:
            os.close(end)


class Emulated:
    """Both have `wire`, towards each other; the first has `side` besides, towards this process."""

    def __init__(self) -> None:
        own = os.getpid()
        self.names = [f"xdit-{own}-{place}" for place in range(2)]
        net = f"10.{200 + own % 50}.{own // 50 % 250}"
        self.addresses, self.outside = [f"{net}.1", f"{net}.2"], f"{net}.129"
        for tool in ("ip", "unshare", "hostname"):
            if shutil.which(tool) is None:
                raise Unable(f"there is no `{tool}`")
        ends = [f"xa{own}", f"xb{own}"]
        try:
            self.cable = Cable(ends)
        except OSError as error:
            raise Unable(f"/dev/net/tun: {error}") from error
        try:
            self._make(ends, f"{net}.130")
        except Unable:
            self.close()
            raise
        self.cable.start()

    def _make(self, ends: list[str], here: str) -> None:
        for name, end, address in zip(self.names, ends, self.addresses, strict=True):
            _do(f"ip netns add {name}")
            _do(f"ip link set {end} netns {name} name wire")
            _do(f"ip -n {name} addr add {address}/25 dev wire")
            for device in ("lo", "wire"):
                _do(f"ip -n {name} link set {device} up")
        _do(f"ip link add {ends[0]} type veth peer name side netns {self.names[0]}")
        _do(f"ip -n {self.names[0]} addr add {self.outside}/30 dev side")
        _do(f"ip -n {self.names[0]} link set side up")
        _do(f"ip addr add {here}/30 dev {ends[0]}")
        _do(f"ip link set {ends[0]} up")

    def torchrun(self, host: int, processes: int, arguments: list[str], log: Path) -> subprocess.Popen[str]:
        """An agent on one of the hosts, and what it starts of `xdit-ir`."""
        how = ["--node-rank", str(host), "--master-addr", self.addresses[0], "--nproc-per-node", str(processes)]
        inside = ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "sh", "-c", ENTER, f"host-{host}"]
        with log.open("w") as file:
            return subprocess.Popen(
                [*inside, *TORCHRUN, *how, "-m", "xdit_ir.tools.cli", *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wire"},
                stdout=file,
                stderr=file,
                text=True,
            )

    def close(self) -> None:
        """Take all down; with the namespaces go the devices."""
        self.cable.close()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _tun(name: str) -> int:
    """A device of this name, by the file that packets are read from and written to."""
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), TUN_WITHOUT_HEADER))
    return end


def _do(command: str) -> str:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unable(f"`{command}`: {done.stderr.strip()}")
    return done.stdout
