"""`xdit-ir serve`: a pipeline's folder behind OpenAI's images endpoint and a plain one."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import signal
from typing import Any

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
    import uvicorn

    from xdit_ir.serving.app import make_app

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that ranks are ended first, as after Ctrl-C
    logging.basicConfig(format="%(message)s")
    LOG.setLevel(logging.INFO)
    setup, data, hosts = cmd_generate.setup_of(args), checked_data(args.data), Hosts.here()
    mesh = Mesh.of(**setup.degrees)
    near = hosts.share(mesh.world_size * data)
    spec = TeamSpec(setup, mesh.world_size, 0, args.device, args.fps, args.start, args.grace, near, hosts.address)
    lobby = None
    if hosts.count > 1:
        store, _, _ = next(iter(rendezvous("env://")))
        terms = {name: str(value) for name, value in vars(args).items() if name not in OWN}
        if hosts.index:
            keep_seats(store, hosts, near, terms)
            return 0
        lobby = Lobby(store, terms)
        LOG.info(told(mesh, [place // near for place in range(mesh.world_size * data)]))
    server = Server(spec, data, args.queue, args.patience, lobby)
    http = uvicorn.Server(uvicorn.Config(make_app(server), host=args.host, port=args.port, log_level="warning"))
    server.start()
    server.watch(lambda: setattr(http, "should_exit", True))
    try:
        http.run()
    finally:
        server.close()
        if lobby is not None:
            lobby.close(hosts.count, near)
    if server.fatal is not None:
        raise server.fatal
    return 0
