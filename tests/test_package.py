"""What ships, and that the files around the package agree with it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml

import adai_dist

ROOT = Path(__file__).parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == adai_dist.__version__
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Xie", "Wang", "Zhang", "Sato", "Sugiyama"]
    assert (paper["year"], paper["volume"], paper["start"], paper["end"]) == (2022, 162, "24430", "24459")


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", read("CHANGELOG.md"), re.MULTILINE)
    assert first
    if ".dev" in adai_dist.__version__:
        assert first.groups() == ("Unreleased", None)
    else:
        assert first[1] == adai_dist.__version__
        assert first[2], "a released version has a date"


def test_the_installed_package_has_this_version_and_the_console_script() -> None:
    installed = distribution("adai-dist")
    assert installed.version == adai_dist.__version__
    scripts = {script.name: script.value for script in installed.entry_points.select(group="console_scripts")}
    assert scripts == {"adai-dist": "adai_dist.cli:main"}


def test_the_package_needs_torch_alone() -> None:
    requirements = distribution("adai-dist").requires
    assert requirements is not None
    assert [requirement for requirement in requirements if "extra ==" not in requirement] == ["torch>=2.6"]


def test_constraints_give_one_exact_version_for_every_distribution_the_commands_install() -> None:
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    exact = re.compile(r'[a-z0-9-]+==[0-9][0-9a-z.]*( ; python_version (<|>=) "3\.11")?')
    assert [line for line in lines if not exact.fullmatch(line)] == []
    assert len(lines) == len({line.split("==")[0] + line.partition(" ;")[2] for line in lines})
    pinned = {line.split("==")[0] for line in lines}
    assert "adai-dist" not in pinned
    for requirement in distribution("adai-dist").requires or ():
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        name = re.match(r"[A-Za-z0-9_-]+", requirement)
        assert name
        if extra is None or extra[1] in {"train", "test", "deepspeed", "mpi", "dev", "docs"}:
            assert name[0].lower() in pinned, requirement


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the package as it is, plus the native sources of tomorrow."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "adai_dist", tree / "adai_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    csrc = tree / "adai_dist" / "kernels" / "csrc"
    csrc.mkdir(parents=True, exist_ok=True)
    for name in ("probe.h", "probe.cpp", "probe.cu"):
        (csrc / name).touch()
    (tree / "adai_dist" / "kernels" / "probe.so").touch()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist"]
    finished = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (built,) = (tree / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_source_and_data_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    csrc = {f"adai_dist/kernels/csrc/probe.{suffix}" for suffix in ("h", "cpp", "cu")}
    files = (path for path in (ROOT / "adai_dist").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in {".so", ".o"}}
    assert shipped == expected | csrc
    assert "adai_dist/py.typed" in shipped


def test_the_wheel_carries_version_licence_and_console_script(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"adai_dist-{adai_dist.__version__}.dist-info"
        assert "adai-dist = adai_dist.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert archive.read(f"{info}/licenses/LICENSE").decode() == read("LICENSE")
        metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
