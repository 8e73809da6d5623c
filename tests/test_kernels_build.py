"""Kernels are compiled once per machine, by one process, and loaded from the cache afterwards."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension

from adai_dist.cli import main
from adai_dist.kernels import build, build_cache, toolchain
from adai_dist.kernels.build import Extension
from tests.tiny_extension import TINY, message_of, needs_toolchain, tiny_extension

# Arguments: the source, and a folder in which to leave a mark before loading.
LOAD = """
import json, os, sys
from pathlib import Path
from adai_dist.kernels.build import BuildError, Extension, load

source, here = map(Path, sys.argv[1:])
(here / f"{os.getpid()}.here").touch()
facts = {}
try:
    library = load(Extension("tiny", "cpu", (source,), ("-O1",)))
    facts["path"], facts["is_new"] = str(library.path), library.seconds is not None
    facts["is_loaded"] = str(library.path) in open("/proc/self/maps").read()
except BuildError as error:
    facts["error"] = str(error)
facts["modules"] = [name for name in ("torch.utils.cpp_extension", "setuptools") if name in sys.modules]
print(json.dumps(facts))
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Extension:
    return tiny_extension(tmp_path, monkeypatch)


def compiler_that(first: str, folder: Path) -> Path:
    """Return a compiler that runs a command before each file, and records the files that it compiles."""
    wrapper = folder / "bin" / "g++"
    wrapper.parent.mkdir()
    compiles = f'case "$*" in *" -c "*) echo x >> {folder}/compiled; {first} ;; esac'
    wrapper.write_text(f'#!/bin/sh\n{compiles}\nexec {toolchain.cxx_path()} "$@"\n')
    wrapper.chmod(0o755)
    return wrapper


def num_compiled(folder: Path) -> int:
    return (folder / "compiled").read_text().count("x")


def start(tiny: Extension, folder: Path, stderr: int | None = None, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(tiny.sources[0]), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def facts_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(stdout)


@needs_toolchain
def test_a_compiled_library_loads_without_compiler_ninja_or_cpp_extension(tiny: Extension, tmp_path: Path) -> None:
    library = build.load(tiny)
    assert library.seconds is not None
    assert build.load(tiny) is library
    facts = facts_of(start(tiny, tmp_path, PATH=str(tmp_path)))
    assert facts == {"path": str(library.path), "is_new": False, "is_loaded": True, "modules": []}
    assert sorted(path.name for path in library.path.parent.iterdir()) == ["build.lock", "tiny.so", "tiny.stamp.json"]


@needs_toolchain
def test_a_change_of_sources_headers_flags_or_compiler_invalidates_the_library(
    tiny: Extension, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build.load(tiny).path
    assert build.find(tiny)
    assert not build.find(dataclasses.replace(tiny, cxx_flags=("-O2",)))
    monkeypatch.setenv("CXX", str(compiler_that(":", tmp_path)))
    assert not build.find(tiny), "a compiler named in CXX is the one to use"
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert build.find(tiny), "a compiled library needs no compiler"
    monkeypatch.delenv("CXX")
    (tmp_path / "tiny.h").write_text("// new\n")
    assert not build.find(tiny)
    tiny.sources[0].write_text(TINY.format("second"))
    changed = dataclasses.replace(tiny)
    build._loaded.clear()
    assert build.load(changed).seconds is not None
    assert b"second" in path.read_bytes()
    path.unlink()
    assert not build.find(tiny)


@needs_toolchain
@pytest.mark.distributed
def test_one_of_several_concurrent_processes_compiles_and_all_load(tiny: Extension, tmp_path: Path) -> None:
    cxx = compiler_that("sleep 1", tmp_path)
    facts = [facts_of(process) for process in [start(tiny, tmp_path, CXX=str(cxx)) for _ in range(4)]]
    assert num_compiled(tmp_path) == 1
    assert sorted(fact["is_new"] for fact in facts) == [False, False, False, True]
    assert all(fact["is_loaded"] for fact in facts)


@needs_toolchain
@pytest.mark.distributed
def test_processes_that_waited_for_a_failed_compilation_do_not_repeat_it(tiny: Extension, tmp_path: Path) -> None:
    tiny.sources[0].write_text("broken\n")
    all_wait = f"for i in $(seq 300); do [ $(ls {tmp_path} | grep -c here) = 3 ] && break; sleep 0.1; done; sleep 1"
    cxx = compiler_that(all_wait, tmp_path)
    facts = [facts_of(process) for process in [start(tiny, tmp_path, CXX=str(cxx)) for _ in range(3)]]
    assert num_compiled(tmp_path) == 1
    assert len({fact["error"] for fact in facts}) == 1


@needs_toolchain
@pytest.mark.distributed
def test_a_killed_build_does_not_block_the_next(tiny: Extension, tmp_path: Path) -> None:
    cxx = compiler_that("sleep 100", tmp_path)
    process = start(tiny, tmp_path, CXX=str(cxx))
    deadline = time.monotonic() + 60
    while not (tmp_path / "compiled").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    folder = tmp_path / "extensions" / "tiny"
    try:
        assert list(folder.glob("build-*/tiny/lock")), "torch's own lock, for which a loader would wait forever"
        assert build.load(tiny).seconds is not None
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the compiler, which outlives it
        process.communicate()
    assert sorted(path.name for path in folder.iterdir()) == ["build.lock", "tiny.so", "tiny.stamp.json"]


@needs_toolchain
def test_ninja_beside_python_is_found_and_path_stays_as_it_is(
    tiny: Extension, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, tools = tmp_path / "beside", tmp_path / "tools"
    for folder, names in ((beside, ["ninja"]), (tools, ["as", "ld", "c++"])):
        folder.mkdir()
        for name in names:
            found = shutil.which(name)
            assert found
            (folder / name).symlink_to(os.path.realpath(found))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_, **__: str(beside))
    assert build.load(tiny).seconds is not None
    assert os.environ["PATH"] == str(tools)


@needs_toolchain
def test_compiler_errors_are_reported_once_and_logged_to_a_file(
    tiny: Extension, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler_that(":", tmp_path)))
    tiny.sources[0].write_text("int f() { return unheard_of; }\n")
    message = message_of(tiny)
    assert "tiny.cpp:1:18: error: " in message
    assert "unheard_of" in message
    assert message.count("\n") <= 8
    log = tmp_path / "extensions" / "tiny" / "build.log"
    assert str(log) in message
    assert "unheard_of" in log.read_text()
    assert message_of(tiny) == message
    assert num_compiled(tmp_path) == 1, "the same process does not try again"
    tiny.sources[0].write_text(TINY.format("repaired"))
    path = build.load(tiny).path
    assert sorted(path.name for path in path.parent.iterdir()) == ["build.lock", "tiny.so", "tiny.stamp.json"]


def replaced(path: Path, content: bytes) -> None:
    path.unlink()  # this process has mapped the file, and would crash at exit if that were truncated in place
    path.write_bytes(content)


def truncated(path: Path) -> None:
    replaced(path, path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    replaced(path, b"")


def overgrown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(4096))


def folder_instead(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def stamp_of_an_earlier_version(path: Path) -> None:
    stamp = path.with_suffix(".stamp.json")
    content = json.loads(stamp.read_text())
    del content["size"]
    stamp.write_text(json.dumps(content))


def stamp_that_is_a_list(path: Path) -> None:
    path.with_suffix(".stamp.json").write_text('["size"]')


def stamp_of_other_bytes(path: Path) -> None:
    path.with_suffix(".stamp.json").write_bytes(b"\xff\xfe{")


def stamp_that_is_a_folder(path: Path) -> None:
    folder_instead(path.with_suffix(".stamp.json"))


DAMAGES = (
    *(truncated, empty, overgrown, folder_instead, link_to_nothing, Path.unlink),
    *(stamp_of_an_earlier_version, stamp_that_is_a_list, stamp_of_other_bytes, stamp_that_is_a_folder),
)


@needs_toolchain
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_library_or_stamp_is_recompiled(
    tiny: Extension, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = build.load(tiny).path
    content = path.read_bytes()
    damage(path)
    build._loaded.clear()
    assert build.find(tiny) is None
    facts = facts_of(start(tiny, tmp_path))  # loading a truncated library would crash the process
    assert facts["is_new"]
    assert facts["path"] == str(path)
    assert (len(path.read_bytes()), path.is_symlink()) == (len(content), False)
    assert not facts_of(start(tiny, tmp_path))["is_new"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["build.lock", "tiny.so", "tiny.stamp.json"]


@needs_toolchain
def test_only_the_compiling_process_announces_the_compilation_on_stderr(tiny: Extension, tmp_path: Path) -> None:
    path = tmp_path / "extensions" / "tiny" / "tiny.so"
    process = start(tiny, tmp_path, stderr=subprocess.PIPE)
    _, stderr = process.communicate(timeout=120)
    begin, end = stderr.splitlines()
    assert begin == f"adai_dist: compiling tiny into {path}, once per machine; it takes seconds"
    assert re.fullmatch(r"adai_dist: compiled tiny in \d+\.\d s", end)
    process = start(tiny, tmp_path, stderr=subprocess.PIPE)
    assert process.communicate(timeout=120)[1] == ""


@needs_toolchain
def test_the_error_of_a_library_that_does_not_load_states_its_path_and_the_remedy(tiny: Extension) -> None:
    path = build.load(tiny).path
    size = path.stat().st_size
    path.unlink()
    path.write_text("no library".ljust(size))
    build._loaded.clear()
    assert message_of(tiny).startswith("the compiled library must load; got ")
    assert f"delete the folder {path.parent}" in message_of(tiny)


def test_the_default_folder_is_that_of_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = torch.utils.cpp_extension._get_build_directory("some_name", verbose=False)
    assert str(build_cache.library_path("some_name").parent) == expected


@needs_toolchain
def test_the_command_builds_ahead_of_time_in_one_line_per_library(
    tiny: Extension, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(build.EXTENSIONS, "cpu", tiny)
    path = build_cache.library_path("tiny")
    assert build_command("--device", "cpu") == 0
    assert re.fullmatch(rf"tiny: {path}, compiled in \d+\.\d s\n", capfd.readouterr().out)
    build._loaded.clear()
    assert build_command("--device", "cpu") == 0
    assert capfd.readouterr() == (f"tiny: {path}, up to date\n", "")
    monkeypatch.setenv("DS_BUILD_TINY", "0")
    assert build_command("--device", "cpu") == 0
    assert capfd.readouterr() == ("tiny: left out, DS_BUILD_TINY=0\n", "")


@needs_toolchain
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_the_command_reports_each_failed_build_in_one_line(
    tiny: Extension, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(build.EXTENSIONS, "cpu", tiny)
    assert build_command() == 0, "the devices of this machine"
    assert capfd.readouterr().out.count("\n") == 1
    assert build_command("--device", "all") == 2
    out, err = capfd.readouterr()
    assert out.startswith("tiny: ")
    assert err.startswith("adai-dist: fused_adai: kernels for CUDA need a torch that was built with CUDA; got torch ")
    assert err.count("\n") == 1


def build_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["build", *arguments])
    return int(end.value.code or 0)


def test_the_sources_and_headers_of_the_kernels_are_in_one_folder() -> None:
    for extension in build.EXTENSIONS.values():
        assert all(source.exists() for source in extension.sources)
        assert {source.parent for source in extension.sources} == {build.CSRC}
    assert not [flag for flag in build.CPU.cxx_flags if "fast" in flag or "march" in flag]
