"""The matrix of versions: its columns select tests, failures are counted, and the page shows the recorded results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest
import yaml

from tests.version_matrix import (
    KINDS,
    PAGE,
    ROOT,
    ROWS,
    Outcome,
    Result,
    files,
    read_report,
    read_results,
    render,
    write_result,
)


def junit(path: Path, modules: dict[str, dict[str, str]]) -> Path:
    """Write a report with the contents of the elements of tests, by module and by name."""
    tests = "".join(
        f"<testcase classname='tests.{module}' name={quoteattr(name)} time='1.5'>{content}</testcase>"
        for module, cases in modules.items()
        for name, content in cases.items()
    )
    path.write_text(f"<testsuites><testsuite>{tests}</testsuite></testsuites>")
    return path


@pytest.fixture
def result() -> Result:
    return Result("2026-01-02", {"Python": "3.11.7", "torch": "2.6.0", "numpy": "2.4.6"})


@pytest.mark.exhaustive
def test_every_column_selects_tests() -> None:
    modules = sorted({file for kind in KINDS for file in files(kind.columns)})
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not slow and not gpu", *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert listed.returncode == 0, listed.stdout[-2000:] + listed.stderr
    tests = [line.split("::", 1) for line in listed.stdout.splitlines() if "::" in line]
    empty = [
        f"{kind.name}, {title}: {module} {words!r}"
        for kind in KINDS
        for title, column in kind.columns.items()
        for module, words in column.items()
        if not any(file == f"tests/{module}.py" and re.search(words, name) for file, name in tests)
    ]
    assert empty == []


def test_outcomes_are_counted_by_column(tmp_path: Path, result: Result) -> None:
    report = junit(
        tmp_path / "report.xml",
        {
            "test_first": {
                "test_a[clipped]": "",
                "test_a[plain]": "<failure message='1 != 2'/>",
                "test_b": "<error message='no'/>",
            },
            "test_other": {"test_e": "<failure message='no'/>"},
            "folder.test_second.Class": {"test_c": "<skipped message='before torch 2.9: no'/>", "test_d": ""},
        },
    )
    columns = {"clipping": {"test_first": "clipped"}, "all": {"test_first": "", "folder/test_second": ""}}
    read_report(report, columns, result)
    assert result.outcomes == {"clipping": Outcome(1, 0, 0, 1.5), "all": Outcome(2, 2, 1, 7.5)}
    assert result.failures == ["test_first::test_a[plain]", "test_first::test_b", "test_other::test_e"]
    assert result.skips == {"before torch 2.9: no": 1}


def test_a_module_runs_once_however_many_columns_count_its_tests() -> None:
    columns = {"a": {"test_x": ""}, "b": {"test_x": "[1]", "test_y": ""}, "c": {"test_y": "[2]"}}
    assert files(columns) == ["tests/test_x.py", "tests/test_y.py"]


@pytest.mark.parametrize("crashes", [False, True])
def test_a_column_without_tests_fails(tmp_path: Path, result: Result, crashes: bool) -> None:
    report = tmp_path / "report.xml"
    if not crashes:
        junit(report, {"test_module": {"test_a": ""}})
    read_report(report, {"clipping": {"test_module": "clipped"}}, result)
    assert result.outcomes == {"clipping": Outcome(failed=1)}
    assert result.failures == ["test_module: no test that matches 'clipped'"]


def test_the_page_has_a_line_for_every_row_and_marks_what_was_not_run(result: Result, tmp_path: Path) -> None:
    result.outcomes = {
        "core": Outcome(passed=3),
        "kernels": Outcome(1, 2, 0),
        "trajectory": Outcome(skipped=4),
    }
    result.skips = {"before torch 2.9: no": 4}
    result.failures = ["test_backends::test_a"]
    write_result("torch-2.6", result, tmp_path)
    lines = render(read_results(tmp_path)).splitlines()
    assert "| torch | date | core | kernels | trajectory | layouts | with |" in lines
    ran = "| 2.6.0 | 2026-01-02 | 3 passed | 1 passed, 2 **failed** | 4 skipped | – | Python 3.11.7, numpy 2.4.6 |"
    assert ran in lines
    assert "| 2.8 | – | – | – | – | – | – |" in lines
    assert "- 2.6.0: 4 skipped: before torch 2.9: no" in lines
    assert "- 2.6.0: failed: `test_backends::test_a`" in lines
    assert len([line for line in lines if re.match(r"\| [\d.n]", line)]) == len(ROWS)


def test_a_new_result_replaces_that_of_its_row_only(tmp_path: Path, result: Result) -> None:
    write_result("torch-2.6", result, tmp_path)
    write_result("torch-2.8", result, tmp_path)
    later = Result("2026-02-03", result.versions)
    write_result("torch-2.8", later, tmp_path)
    assert read_results(tmp_path) == {"torch-2.6": result, "torch-2.8": later}


def test_the_page_shows_the_recorded_results_of_the_present_columns() -> None:
    results = read_results()
    assert PAGE.read_text() == render(results), "write the page with: make test-versions ARGS='-s page'"
    assert {name: set(found.outcomes) for name, found in results.items()} == {
        name: set(ROWS[name].kind.columns) for name in results
    }


def test_a_row_replaces_the_pins_that_its_version_contradicts() -> None:
    pins = "numpy==2.4.6\nsetuptools==84.2.1\nsympy==1.14.0\ntorch==2.13.0\ntorchmetrics==1.9.0\n"
    assert ROWS["torch-2.6"].constraints(pins) == "numpy==2.4.6\ntorchmetrics==1.9.0\ntorch==2.6.*\n"
    assert ROWS["deepspeed-0.16.0"].constraints(pins) == f"{pins}deepspeed==0.16.0\n"
    assert ROWS["torch-newest"].constraints(pins) == ROWS["python-3.12"].constraints(pins) == pins


def test_every_python_and_the_oldest_torch_have_rows() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert {f"python-{version}" for version in tested["python"]} <= ROWS.keys()
    assert {f"torch-{version}" for version in tested["torch"] if version[0].isdigit()} <= ROWS.keys()
