"""The tables of configs/README.md."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.recipe_runs import ROOT

PAGE = ROOT / "configs/README.md"


@dataclass(frozen=True)
class Row:
    files: tuple[str, ...]
    cells: dict[str, str]
    tests: tuple[str, ...]

    def bytes_in_memory(self, when: str, num_ranks: int, num_shards: int) -> float:
        """Return the bytes per parameter on one rank, on all devices, for a model smaller than the NVMe buffers."""
        total = 0.0
        for term in self.cells[f"bytes {when}"].split(" + "):
            amount, _, place = term.replace("2 GB", "20/n").partition(" ")
            number, _, divisor = amount.partition("/")
            if place != "NVMe":
                total += float(number) / {"": 1, "n": num_ranks, "s": num_shards}[divisor]
        return total


def _rows() -> dict[str, Row]:
    rows: dict[str, Row] = {}
    names: list[str] = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            names = []
        elif not names:
            names = cells
        elif not cells[0].startswith("---"):
            files = tuple(re.findall(r"\]\(([^)]+)\)", cells[0]))
            tests = tuple(re.findall(r"\]\(\.\./(tests/[^)]+)\)", cells[-1]))
            row = Row(files, dict(zip(names, cells, strict=True)), tests)
            for file in files:
                assert file not in rows, file
                rows[file] = row
    return rows


ROWS = _rows()
