"""Contents of the distributions, and consistency of the package with the files around it."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import adai_dist

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


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


def test_the_package_requires_only_torch() -> None:
    requirements = distribution("adai-dist").requires
    assert requirements is not None
    assert [requirement for requirement in requirements if "extra ==" not in requirement] == ["torch>=2.6"]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_give_one_exact_version_for_every_distribution_the_commands_install(python: str) -> None:
    lines = [Requirement(line) for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    environment = {"python_version": python, "python_full_version": f"{python}.7", "sys_platform": "linux"}
    here = [line for line in lines if line.marker is None or line.marker.evaluate(environment)]
    pinned = {line.name: str(line.specifier) for line in here}
    assert len(pinned) == len(here)
    assert [
        str(line) for line in lines if line.extras or not re.fullmatch(r"==[0-9][0-9a-z.]*", str(line.specifier))
    ] == []
    assert not [name for name in pinned if name.startswith(("adai-dist", "cuda", "nvidia", "triton"))]
    project, groups = PYPROJECT["project"], PYPROJECT["dependency-groups"]
    tables = (project["optional-dependencies"], groups)
    needed = [Requirement(given) for table in tables for part in table.values() for given in part]
    for requirement in [*map(Requirement, project["dependencies"]), *needed]:
        if requirement.name != "adai-dist" and (requirement.marker is None or requirement.marker.evaluate(environment)):
            assert requirement.name in pinned


def test_user_dependencies_have_a_minimum_version_and_no_maximum_and_one_extra_installs_all() -> None:
    extras = dict(PYPROJECT["project"]["optional-dependencies"])
    assert extras.pop("all") == [f"adai-dist[{','.join(extras)}]"]
    for given in [*PYPROJECT["project"]["dependencies"], *itertools.chain(*extras.values())]:
        operators = [part.operator for part in Requirement(given).specifier]
        assert operators.count(">=") == 1, given
        assert set(operators) <= {">=", "!="}, given


def test_every_file_names_the_same_repository_and_documentation() -> None:
    urls = PYPROJECT["project"]["urls"]
    repository, documentation = urls["Repository"], urls["Documentation"]
    assert urls.keys() >= {"Homepage", "Issues", "Changelog", "Paper", "Reference implementation"}
    assert urls["Issues"].startswith(f"{repository}/")
    assert urls["Changelog"] == f"{repository}/blob/main/CHANGELOG.md"
    site = read("mkdocs.yml")
    assert f"site_url: {documentation}\n" in site
    assert f"repo_url: {repository}\n" in site
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["repository-code"], citation["url"]) == (repository, documentation)


def test_workflows_call_commands_of_the_makefile_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    called: set[str] = set()
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            for step in job["steps"]:
                called.update(re.findall(r"^make ([a-z-]+)", step.get("run", ""), re.MULTILINE))
    assert called >= {"lint", "test", "check", "docs", "dist"}
    assert called <= targets


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel of the package with additional native sources."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "adai_dist", tree / "adai_dist", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tree / "configs")
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
    configs = {
        f"adai_dist/{path.relative_to(ROOT).as_posix()}"
        for folder in ("recipes", "deepspeed")
        for path in (ROOT / "configs" / folder).iterdir()
    }
    assert "adai_dist/configs/recipes/lm_tiny.yaml" in configs
    assert shipped == expected | csrc | configs
    assert "adai_dist/py.typed" in shipped


def test_a_recipe_is_found_in_the_wheel_by_its_name(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    (tmp_path / "empty").mkdir()
    program = (
        "from adai_dist.recipes.recipe import load_recipe; from adai_dist.recipes.recipe import find_config\n"
        "assert load_recipe('lm_tiny').run.name == 'lm_tiny'\n"
        "print(find_config('recipes', 'lm_tiny', 'the recipe'), find_config('deepspeed', 'zero2', 'deepspeed.config'))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "empty",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    configs = tmp_path / "installed/adai_dist/configs"
    assert finished.stdout.split() == [str(configs / "recipes/lm_tiny.yaml"), str(configs / "deepspeed/zero2.json")]


def test_links_of_the_description_on_pypi_lead_to_files_of_this_version(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"adai_dist-{adai_dist.__version__}.dist-info/METADATA").decode()
    description = metadata.partition("\n\n")[2]
    links = re.findall(r"\]\(([^)\s]+)|^ *\[[^\]]+\]: +(\S+)|(?:href|src|srcset)=\"([^\"]+)", description, re.MULTILINE)
    targets = ["".join(link) for link in links]
    assert [target for target in targets if not target.startswith("https://")] == []
    repository = PYPROJECT["project"]["urls"]["Repository"]
    files = [
        path
        for kind in ("blob", "raw")
        for target in targets
        if (path := target.removeprefix(f"{repository}/{kind}/v{adai_dist.__version__}/")) != target
    ]
    assert "CONTRIBUTING.md" in files
    assert [path for path in files if not (ROOT / path.partition("#")[0]).is_file()] == []
    code = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    assert code.findall(description) == code.findall(read("README.md"))


def test_the_wheel_carries_version_licence_and_console_script(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"adai_dist-{adai_dist.__version__}.dist-info"
        assert "adai-dist = adai_dist.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert archive.read(f"{info}/licenses/LICENSE").decode() == read("LICENSE")
        metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
