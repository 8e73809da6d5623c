"""Training on hosts with the scripts of launch/, using a recipe reduced to six steps."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.launch.hosts import Host
from tests.recipe_runs import ROOT, cli_environment, read_lines

LAUNCH = ROOT / "launch"
BOUND_SECONDS = 150.0  # for six steps and the imports on a busy machine, including one compilation by DeepSpeed
# The shipped lm_tiny, reduced in size.
CUT_DOWN = [
    *("run.steps=6", "run.log_every=2", "run.eval_every=3", "run.checkpoint_every=6", "data.val_windows=16"),
    *("model.hidden_size=16", "model.intermediate_size=32", "device=cpu"),
]


def train_words(folder: Path, name: str, *overrides: str) -> list[str]:
    """Return the arguments of a launch script for the reduced recipe, with its run in FOLDER/NAME."""
    recipe = ["adai-dist", "train", "--config", "configs/recipes/lm_tiny.yaml"]
    return [*recipe, f"run.out={folder}", f"run.name={name}", *CUT_DOWN, *overrides]


def environment(**knobs: str | Path | int) -> dict[str, str]:
    """Return the environment of a user's shell with the settings of a launch script."""
    inherited = cli_environment()
    del inherited["GLOO_SOCKET_IFNAME"]  # for tests on one machine; on hosts, gloo finds the interface by the host name
    return {**inherited, **{name: str(value) for name, value in knobs.items()}}


# Arguments that a shell, pdsh, DeepSpeed or argparse might interpret.
WORDS = [
    "run.name=a b; touch x 'y' \"z\" $HOME",
    *("", "--", "-x", "--master_port=1", "%n %h 100%", "new\nline  two", "*", "\\", "`id`", "!x", "~", "#", "&& ü"),
]
# A program that prints how it was started.
SHOW = """
import json, os, platform, sys
names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "NCCL_DEBUG")
line = json.dumps([sys.argv[1:], platform.node(), os.getcwd(), *(os.environ.get(name) for name in names)])
print(line + "\\n", end="", flush=True)
"""


def assert_arguments_are_intact(printed: str) -> None:
    """Check the output of SHOW, started with WORDS (and optionally more) and NCCL_DEBUG=WARN on node1 and node2."""
    lines = [line[line.index("[[") :] for line in printed.splitlines() if '[["run.name' in line]
    seen = sorted((json.loads(line) for line in lines), key=lambda shown: shown[3])
    assert [shown[0][: len(WORDS)] for shown in seen] == [WORDS, WORDS], printed
    assert [shown[1:5] for shown in seen] == [[f"node{rank + 1}", str(ROOT), str(rank), "2"] for rank in range(2)]
    assert [shown[5:] for shown in seen] == [["node1", "1", "WARN"]] * 2, "variables required by training"


def launch(host: Host, script: str, words: Sequence[str | Path], **knobs: str | Path | int) -> str:
    """Run a launch script on one host, require success, and return its output."""
    ended = host.run([LAUNCH / script, *words], BOUND_SECONDS, environment(**knobs), cwd=ROOT)
    assert ended.returncode == 0, f"exit code {ended.returncode}\n{ended.stdout[-6000:]}\n{ended.stderr[-6000:]}"
    return ended.stdout


def launch_on_all(
    hosts: Sequence[Host], script: str, words: Sequence[str | Path], logs: Path, **knobs: str | Path | int
) -> list[str]:
    """Run the same command on all hosts, require success, and return their outputs."""
    nodes = {"NUM_NODES": len(hosts), "MASTER_ADDR": hosts[0].name}
    paths = [logs / f"{host.name}.log" for host in hosts]
    processes: list[subprocess.Popen[bytes]] = []
    for node, (host, path) in enumerate(zip(hosts, paths, strict=True)):
        with path.open("wb") as log:
            rank = {} if script == "torchrun.sh" else {"NODE_RANK": node}  # torchrun assigns node ranks
            env = environment(**{**rank, **nodes, **knobs})
            output = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            processes.append(host.popen([LAUNCH / script, *words], env, cwd=ROOT, **output))
    deadline = time.monotonic() + BOUND_SECONDS
    try:
        codes = [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        codes = None
    printed = [path.read_text() for path in paths]
    assert codes == [0] * len(hosts), f"exit codes {codes}\n" + "\n--- next node\n".join(log[-5000:] for log in printed)
    return printed


def outcome(run: Path) -> list[float]:
    """Return the final held-out loss of a run, followed by its losses and gradient norms."""
    steps = read_lines(run / "metrics.jsonl")
    return [val_loss(run), *(line[key] for key in ("loss", "grad_norm") for line in steps if key in line)]


def val_loss(run: Path) -> float:
    return _summary(run)["val_loss"]


def world_size(run: Path) -> int:
    return _summary(run)["world_size"]


def _summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())
