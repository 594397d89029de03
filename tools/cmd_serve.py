"""`xdit-ir serve`: a pipeline's folder behind OpenAI's images endpoint and a plain one."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from typing import Any

from xdit_ir.errors import ServingError
from xdit_ir.generation.files import FPS
from xdit_ir.ir.mesh import Mesh
from xdit_ir.serving.server import Server
from xdit_ir.serving.team import TeamSpec
from xdit_ir.tools import cmd_generate
from xdit_ir.transport.replicas import checked_data

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

    setup = cmd_generate.setup_of(args)
    size = Mesh.of(**setup.degrees).world_size
    spec = TeamSpec(setup, size, 0, args.device, args.fps, args.start, args.grace)
    server = Server(spec, checked_data(args.data), args.queue, args.patience)
    logging.basicConfig(format="%(message)s")
    http = uvicorn.Server(uvicorn.Config(make_app(server), host=args.host, port=args.port, log_level="warning"))
    server.start()
    server.watch(lambda: setattr(http, "should_exit", True))
    try:
        http.run()
    finally:
        server.close()
    if server.fatal is not None:
        raise server.fatal
    return 0
