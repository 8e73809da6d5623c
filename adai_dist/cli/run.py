"""`adai-dist run`: a script or module with Adai, AdaiW and AdaiV2 registered with DeepSpeed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from adai_dist.cli.exit import report_error
from adai_dist.cli.parser import Commands
from adai_dist.integrations.script import NoProgramError, run_program


def register(commands: Commands) -> None:
    """Add the command, of which argparse handles only the help and a missing program."""
    parser = commands.add_parser(
        "run",
        help="run a script with Adai, AdaiW and AdaiV2 registered with DeepSpeed",
        usage="adai-dist run [-h] (SCRIPT | -m MODULE) [ARGUMENT ...]",
        description="Run a script or module as Python would. The arguments after its name belong to it.",
    )

    def refuse(_: argparse.Namespace) -> None:
        parser.error("the script or module to run is missing")

    parser.set_defaults(run=refuse)


def names_program(words: Sequence[str]) -> bool:
    """Return whether the words after `run` begin with a script, or with -m and a module."""
    is_module = words[:1] == ["-m"]
    return len(words) > is_module and not words[is_module].startswith("-")


def run(words: Sequence[str], launcher_words: Sequence[str]) -> None:
    """Run the program without argparse, which would interpret the program's own options.

    Args:
        words: the program and its arguments.
        launcher_words: the arguments that the launcher inserted; they precede the program's own.
    """
    is_module = words[0] == "-m"
    name, *arguments = words[is_module:]
    try:
        run_program(name, [*launcher_words, *arguments], is_module=is_module)
    except NoProgramError as error:
        sys.exit(report_error(str(error)))
