"""What passes have made true of a program, which those that come after them rely on."""

from __future__ import annotations

from enum import Enum


class Fact(Enum):
    """Something that a pass provides and others require; the value is its word in text."""

    CANONICAL = "canonical"  # each thing has one form: attention is one operator, views are `reshape`
    TOKENS = "tokens"  # where token streams begin is noted, also where there are none
    STAGES = "stages"  # the stage of each outer node is noted
    SEEDS = "seeds"  # which values shall be divided, and how, is decided but not yet written
    LAYOUTS = "layouts"  # every value has a layout on the program's mesh
    ATTENTION = "attention"  # every attention finds its keys
    RUNNABLE = "runnable"  # and every norm the statistics that it takes, so that ranks can be made
    LOCAL = "local"  # it is the program of one rank: sizes are local, and nothing has a layout
