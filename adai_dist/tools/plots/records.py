"""Readers for the files in the folder of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Return the records of a JSON-lines file, in order, without the partial line at the end of a killed run's file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_summary(folder: Path) -> Record:
    """Return the summary of a finished run.

    Raises:
        ValueError: the folder holds none.
    """
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"a run must have a readable summary.json; got {str(folder)!r}; name the folder of a finished run"
        ) from error


def unit_of_loss(summaries: Sequence[Record]) -> str:
    """Return the unit, token or image, over which the losses of all these runs are means.

    Raises:
        ValueError: the runs have different units.
    """
    units = sorted({summary["unit"] for summary in summaries})
    if len(units) != 1:
        got = " and ".join(f"nats per {unit}" for unit in units)
        raise ValueError(f"runs that are compared must have losses in one unit; got {got}; leave out some of the runs")
    return units[0]
