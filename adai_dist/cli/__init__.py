"""The command line, `adai-dist COMMAND`, with one module per command.

A user's mistake prints one line to stderr and exits with code 2, on every rank. Ctrl-C exits with 130. A checkpoint
that cannot be read or written prints one line and exits with 1; any other failure prints its traceback and exits with
1. A program started by `run` exits as it does under Python.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence

from adai_dist.cli import bench, build, compare, run, soak, sweep, to_universal, train
from adai_dist.cli.exit import EXIT_FAILURE, EXIT_INTERRUPTED, end_process, report_error
from adai_dist.cli.parser import CommandParser
from adai_dist.integrations.script import split_local_rank

__all__ = ["build_parser", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process; return only when a program under `run` has finished.

    Args:
        arguments: the words after `adai-dist`; None reads sys.argv.
    """
    launcher_words, words = split_local_rank(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["run"]:
        if run.names_program(words[1:]):
            run.run(words[1:], launcher_words)
            return
        words = words[: 2 if {"-h", "--help"}.intersection(words[1:2]) else 1]
    options = build_parser().parse(words)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        code = options.run(options)
    except KeyboardInterrupt as error:
        report_error(str(error) or "interrupted")
        end_process(EXIT_INTERRUPTED)
    except Exception:
        traceback.print_exc()
        end_process(EXIT_FAILURE)
    end_process(code)


def build_parser() -> CommandParser:
    """Return the parser of the command line, whose `run` option is the function that runs the chosen command."""
    parser = CommandParser.for_program()
    for command in (train, sweep, run, compare, bench, soak, build, to_universal):
        command.register(parser.commands)
    return parser
