"""Griffe extension that converts reStructuredText in docstrings (roles, math, literal blocks, tables) to Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod|obj):`~?([^`]+)`")
INLINE_MATH = re.compile(r":math:`([^`]+)`")
INDENTED = r"((?:[ ]+\S.*\n|[ ]*\n)+)"
MATH_BLOCK = re.compile(rf"^([ ]*)\.\. math::\n{INDENTED}", re.MULTILINE)
LITERAL_BLOCK = re.compile(rf"^([ ]*)(\S.*)::\n\n{INDENTED}", re.MULTILINE)
TABLE = re.compile(r"^=+(?: +=+)+\n(?:.+\n)+?=+(?: +=+)+\n(?:.+\n)+?=+(?: +=+)+$", re.MULTILINE)

UNCONVERTED = re.compile(r"^ *\.\. [a-z-]+::|:[a-z]+:`|^ *=+ +=+ *$", re.MULTILINE)


class MarkdownDocstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    text = MATH_BLOCK.sub(_math, text + "\n")
    text = LITERAL_BLOCK.sub(_literal, text)
    text = TABLE.sub(_table, text)
    text = INLINE_MATH.sub(r"\\(\1\\)", text)
    text = ROLE.sub(lambda match: f"`{match[1].removeprefix('adai_dist.')}`", text).rstrip()
    if found := UNCONVERTED.search(text):
        raise ValueError(f"docstrings may use roles, math, literal blocks and simple tables; got {found[0]!r}")
    return text


def _math(match: re.Match[str]) -> str:
    formula = textwrap.dedent(match[2]).strip()
    block = f"\\[\n\\begin{{split}}\n{formula}\n\\end{{split}}\n\\]\n"
    return textwrap.indent(block, match[1]) + "\n"


def _literal(match: re.Match[str]) -> str:
    block = f"{match[2]}:\n\n```text\n{textwrap.dedent(match[3]).strip()}\n```\n"
    return textwrap.indent(block, match[1]) + "\n"


def _table(match: re.Match[str]) -> str:
    lines = match[0].splitlines()
    columns = [found.span() for found in re.finditer("=+", lines[0])]
    columns[-1] = (columns[-1][0], 10_000)
    rows = [[line[start:end].strip() for start, end in columns] for line in (lines[1], *lines[3:-1])]
    rows.insert(1, ["---"] * len(columns))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
