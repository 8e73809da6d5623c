"""The argument parser: argparse, with suggestions for misspelt words and key=value pairs in any position."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import adai_dist
from adai_dist.cli.exit import EXIT_USAGE

Commands = Any
"""The object returned by `ArgumentParser.add_subparsers`, whose class is private."""


def given_options(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that were given, by name; the settings of the command have the defaults of the others."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


class CommandParser(argparse.ArgumentParser):
    """The parser of the program or of one command."""

    commands: Commands = None
    """The commands of the program; None in the parser of a command."""
    more_help: Callable[[], str] | None = None
    """Text appended to the help, computed only when the help is printed."""

    @classmethod
    def for_program(cls) -> CommandParser:
        """Return the parser of `adai-dist`, to which commands can be added."""
        parser = cls(prog="adai-dist", description="Adaptive Inertia for distributed training with PyTorch.")
        parser.add_argument("--version", action="version", version=f"adai-dist {adai_dist.__version__}")
        parser.commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        return parser

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse all words of the command line; `overrides` collects the key=value pairs.

        argparse accepts no positional argument after an option; here key=value may follow options.
        """
        self._suggest_correction(words)
        options, rest = self.parse_known_args(words)
        unknown = [word for word in rest if word.startswith("-") or "=" not in word]
        if unknown or (rest and "overrides" not in options):
            self.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
        if rest:
            options.overrides = [*options.overrides, *rest]
        return options

    def format_help(self) -> str:
        """Return the help with `more_help` at its end."""
        return super().format_help() + (f"\n{self.more_help()}\n" if self.more_help else "")

    def _suggest_correction(self, words: Sequence[str]) -> None:
        """Exit if a word is misspelt; argparse would complain about missing arguments first."""
        known_options = list(self._option_string_actions)
        for index, word in enumerate(words):
            name = word.partition("=")[0]
            if name.startswith("-"):
                is_negative_number = name[1:2].isdigit() or name[1:2] == "."
                is_abbreviation = any(option.startswith(name) for option in known_options)
                if not is_negative_number and not is_abbreviation:
                    self._exit_if_similar("option", name, known_options)
            elif self.commands is not None:
                if word not in self.commands.choices:
                    self._exit_if_similar("command", word, self.commands.choices)
                else:
                    self.commands.choices[word]._suggest_correction(words[index + 1 :])
                return

    def _exit_if_similar(self, kind: str, word: str, known: Iterable[str]) -> None:
        similar = difflib.get_close_matches(word, known, n=1)
        if similar:
            self.exit(EXIT_USAGE, f"{self.prog}: unknown {kind} {word!r}; did you mean {similar[0]!r}?\n")
