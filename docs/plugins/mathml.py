"""MkDocs hook: formulas become MathML when the site is built, so that pages need no script and no other server."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# what pymdownx.arithmatex leaves: <span class="arithmatex">\(...\)</span>, <div class="arithmatex">\[...\]</div>
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.DOTALL)

NOT_CONVERTED = re.compile(r"\\|&(?!#?\w+;)")


def on_page_content(page_html: str, /, **_: Any) -> str:
    return FORMULA.sub(_mathml, page_html)


def _mathml(match: re.Match[str]) -> str:
    tag, bracket, formula = match.groups()
    mathml = convert(html.unescape(formula), display="block" if bracket == "[" else "inline")
    if NOT_CONVERTED.search(mathml):
        raise ValueError(f"formulas must be LaTeX that latex2mathml knows (split, not aligned); got {formula!r}")
    return f'<{tag} class="arithmatex">{mathml}</{tag}>'
