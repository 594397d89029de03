"""The command line `xdit-ir`: parse, dispatch, and turn our own errors into a line and an exit status."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version

from xdit_ir.errors import XditError
from xdit_ir.tools import (
    cmd_bench,
    cmd_calibrate,
    cmd_check,
    cmd_generate,
    cmd_inspect,
    cmd_models,
    cmd_opt,
    cmd_passes,
    cmd_plan,
    cmd_serve,
    cmd_support,
)

USAGE_ERROR = 2
STOPPED = 130  # as shells say of what Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success; 130 after Ctrl-C; 2 for wrong usage and for every `XditError`, which becomes one line on standard
        error; or the command's own status.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")  # nothing users could act on
    try:
        args = _parsed(_parser(), argv)
        status = int(args.run(args))
        sys.stdout.flush()
    except SystemExit as stop:  # argparse: --help, or wrong usage
        return stop.code if isinstance(stop.code, int) else USAGE_ERROR
    except XditError as error:
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"xdit-ir: {rank}{error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("xdit-ir: stopped", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # `xdit-ir inspect ... | head`; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """As `parse_args`, which does not say what is near an option that there is not."""
    args, unknown = parser.parse_known_args(argv)
    command = args.parser
    del args.parser
    if unknown:
        known = [name for action in command._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xdit-ir",
        description="Port a diffusion transformer to several GPUs: look at it and check it on a laptop.",
    )
    parser.add_argument("--version", action="version", version=f"xdit-ir {version('xdit-ir')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    looking = (cmd_inspect, cmd_plan, cmd_calibrate, cmd_check, cmd_passes, cmd_opt)
    for command in (cmd_generate, cmd_serve, *looking, cmd_bench, cmd_models, cmd_support):
        command.add_parser(commands)
    for one in commands.choices.values():
        one.set_defaults(parser=one)
    return parser


if __name__ == "__main__":
    sys.exit(main())
