"""MkDocs hook that converts formulas to MathML at build time, so that pages need neither scripts nor other servers."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# output of pymdownx.arithmatex: <span class="arithmatex">\(...\)</span>, <div class="arithmatex">\[...\]</div>
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.DOTALL)

UNCONVERTED = re.compile(r"\\|&(?!#?\w+;)")


def on_page_content(page_html: str, /, **_: Any) -> str:
    return FORMULA.sub(_mathml, page_html)


def _mathml(match: re.Match[str]) -> str:
    tag, bracket, formula = match.groups()
    mathml = convert(html.unescape(formula), display="block" if bracket == "[" else "inline")
    if UNCONVERTED.search(mathml):
        raise ValueError(f"formulas must be LaTeX that latex2mathml knows (split, not aligned); got {formula!r}")
    return f'<{tag} class="arithmatex">{mathml}</{tag}>'
