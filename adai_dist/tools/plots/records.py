"""What a run left in its folder, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """The records of a JSON-lines file, in order, without the half line that a killed run may leave at its end."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_summary(folder: Path) -> Record:
    """The summary of a finished run.

    Raises:
        ValueError: the folder holds none.
    """
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"a run must have a readable summary.json; got {str(folder)!r}; name the folder of a finished run"
        ) from error
