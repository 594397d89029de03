"""`xdit-ir serve`: a pipeline's folder behind OpenAI's images endpoint and a plain one."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import signal
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from xdit_ir.errors import ServingError
from xdit_ir.generation.files import FPS
from xdit_ir.ir.mesh import Mesh
from xdit_ir.serving.hosts import Hosts, Lobby, keep_seats
from xdit_ir.serving.server import Server
from xdit_ir.serving.team import TeamSpec
from xdit_ir.tools import cmd_generate
from xdit_ir.transport.replicas import checked_data
from xdit_ir.transport.spread import told

LOG = logging.getLogger("xdit_ir")
OWN = ("run", "host", "port", "queue", "patience")  # of the host with the server
NEEDED = ("fastapi", "uvicorn", "diffusers")

PORTS = 1 << 16


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve", help="serve a diffusers pipeline over HTTP; starts its own processes, and starts them anew"
    )
    parser.add_argument("pipeline", metavar="FOLDER", help="what save_pretrained of a pipeline wrote, or a hub name")
    parser.add_argument("--lora", action="append", default=[], metavar="PATH[:SCALE]", help="may be repeated")
    cmd_generate.add_how(parser, "replicas of all these processes that share the requests")
    parser.add_argument("--fps", type=int, default=FPS, help="of videos (default %(default)s)")
    serve = parser.add_argument_group("serving")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="default %(default)s")
    serve.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="ranks are kept by actors of this Ray cluster",
    )
    serve.add_argument("--queue", type=int, default=256, metavar="N", help="requests that may wait (default 256)")
    serve.add_argument("--patience", type=float, default=600.0, metavar="S", help="seconds for a request (default 600)")
    serve.add_argument("--start", type=float, default=1800.0, metavar="S", help="seconds to load (default 1800)")
    serve.add_argument("--grace", type=float, default=120.0, metavar="S", help="seconds to stop in (default 120)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until it is stopped; raises `ServingError` if the ranks cannot be kept running."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ServingError(f"serve needs {', '.join(missing)}: pip install xdit-ir[serve,zoo]")
    if not 0 < args.port < PORTS:
        raise ServingError(f"--port {args.port}: expected 1 to {PORTS - 1}, such as 8000")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that ranks are ended first, as after Ctrl-C
    logging.basicConfig(format="%(message)s")
    LOG.setLevel(logging.INFO)
    hosts, setup, data = Hosts.here(), cmd_generate.setup_of(args), checked_data(args.data)
    mesh = Mesh.of(**setup.degrees)
    near = hosts.share(mesh.world_size * data)
    spec = TeamSpec(setup, mesh.world_size, 0, args.device, args.fps, args.start, args.grace, near, hosts.address)
    with ExitStack() as stack:
        if args.ray is not None:
            return _serve(args, *_by_actors(args, hosts, spec, data, stack), stack)
        if hosts.count == 1:
            return _serve(args, spec, data, None, stack)
        store, _, _ = next(iter(rendezvous("env://")))
        terms = {name: str(value) for name, value in vars(args).items() if name not in OWN}
        if hosts.index:
            keep_seats(store, hosts, near, terms)
            return 0
        lobby = Lobby(store, terms)
        stack.callback(lobby.close, hosts.count, near)
        LOG.info(told(mesh, [place // near for place in range(mesh.world_size * data)]))
        return _serve(args, spec, data, lobby, stack)


def _by_actors(
    args: argparse.Namespace, hosts: Hosts, spec: TeamSpec, data: int, stack: ExitStack
) -> tuple[TeamSpec, int, Lobby]:
    """All ranks are elsewhere, on seats that actors of Ray keep."""
    if hosts.count > 1:
        raise ServingError(f"--ray finds hosts itself; expected no launcher, which has started {hosts.count} processes")
    if importlib.util.find_spec("ray") is None:
        raise ServingError("--ray needs ray: pip install xdit-ir[ray]")
    from xdit_ir.serving.actors import HOST, Actors

    count = spec.near
    actors = Actors(count, args.ray, args.device, args.start)
    stack.callback(actors.close)
    lobby = Lobby(HashStore(), {})
    stack.callback(lobby.close, HOST + 1, count)
    actors.keep(lobby.way(actors.address))
    if text := told(Mesh.of(**spec.setup.degrees), actors.hosts):
        LOG.info(text)
    return replace(spec, first=HOST * count, address=actors.address), data, lobby


def _serve(args: argparse.Namespace, spec: TeamSpec, data: int, lobby: Lobby | None, stack: ExitStack) -> int:
    import uvicorn

    from xdit_ir.serving.app import make_app

    server = Server(spec, data, args.queue, args.patience, lobby)
    http = uvicorn.Server(uvicorn.Config(make_app(server), host=args.host, port=args.port, log_level="warning"))
    stack.callback(server.close)
    LOG.info("http://%s:%d takes requests, which wait until ranks are ready", args.host, args.port)
    server.start()
    server.watch(lambda: setattr(http, "should_exit", True))
    http.run()
    if server.fatal is not None:
        raise server.fatal
    return 0
