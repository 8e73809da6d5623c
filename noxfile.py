"""Runs the tests against other versions of Python, torch, DeepSpeed, Accelerate and transformers.

`make test-versions` calls it. There is a session for each row of `tests/version_matrix.py`: `nox --list` shows them,
`nox -s torch-2.6` runs one, and `nox -s torch-2.6 -- core kernels` only some of its columns, without recording them.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).parent))

from tests.version_matrix import (
    INSTALLED,
    PAGE,
    ROOT,
    ROWS,
    Result,
    Row,
    files,
    read_report,
    read_results,
    render,
    write_result,
)

nox.needs_version = ">=2025.2.9"

# One path for all rows in turn: the flags of compiled operators contain it, and rows with the same torch share these.
ENVIRONMENT = ROOT / "build" / "versions" / "environment"
PYTHON = str(ENVIRONMENT / "bin" / "python")


def run_row(session: nox.Session, row: Row) -> None:
    """Run the tests of a row and record their outcomes."""
    if unknown := sorted(set(session.posargs) - row.kind.columns.keys()):
        session.error(f"arguments must be columns of {row.name}: {', '.join(row.kind.columns)}; got {unknown}")
    columns = {title: row.kind.columns[title] for title in session.posargs or row.kind.columns}
    folder = ROOT / "build" / "versions" / row.name
    folder.mkdir(parents=True, exist_ok=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(row.constraints((ROOT / "constraints.txt").read_text(encoding="utf-8")), encoding="utf-8")
    session.run("uv", "venv", "--quiet", "--clear", "--python", row.python, str(ENVIRONMENT))
    install = ("uv", "pip", "install", "--quiet", "--python", PYTHON)
    session.run(*install, "-c", str(constraints), "-e", ".[kernels]", *row.requirements)
    result = Result(datetime.date.today().isoformat(), installed_versions(session))
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    session.run(
        *(PYTHON, "-m", "pytest", "-q", "-m", "not slow and not gpu", "--continue-on-collection-errors"),
        *("--numprocesses=2", "--dist=loadfile", f"--junitxml={report}", *files(columns)),
        success_codes=range(256),  # the report tells what failed
    )
    read_report(report, columns, result)
    for title, outcome in result.outcomes.items():
        session.log(f"{title}: {outcome}")
    if not session.posargs:
        write_result(row.name, result)
        write_page()
    if result.failures:
        session.error("\n".join(["failed:", *result.failures]))


def installed_versions(session: nox.Session) -> dict[str, str]:
    """Return the versions in the environment that the page names."""
    python = session.run(PYTHON, "--version", silent=True)
    listed = json.loads(
        session.run("uv", "pip", "list", "--quiet", "--format", "json", "--python", PYTHON, silent=True)
    )
    found = {one["name"]: one["version"] for one in listed}
    return {"Python": python.split()[-1], **{name: found[name] for name in INSTALLED if name in found}}


def write_page() -> None:
    """Write docs/versions.md from the recorded results."""
    PAGE.write_text(render(read_results()), encoding="utf-8")


def add_session(row: Row) -> None:
    """Make a row a session of nox."""

    @nox.session(name=row.name, venv_backend="none", tags=[row.kind.name])
    def run(session: nox.Session) -> None:
        run_row(session, row)

    run.__doc__ = f"{row.kind.title} {row.version}: {', '.join(row.kind.columns)}"


for _row in ROWS.values():
    add_session(_row)


@nox.session(venv_backend="none", default=False)
def page(session: nox.Session) -> None:
    """Write docs/versions.md from the recorded results, as after a merge."""
    write_page()
