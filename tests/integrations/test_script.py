"""`adai-dist run`: programs run as under plain Python, with the optimizers registered, under every launcher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adai_dist.integrations.script import split_local_rank
from tests.recipe_runs import DEEPSPEED, LAUNCHERS, MPIRUN, cli_environment, free_port, launch_module, run_command

FACTS = """
import atexit, json, os, sys

seen: int = 0  # makes __annotations__

def fail():
    raise ValueError("deep inside")

atexit.register(lambda: print(sys.modules["__main__"].__dict__ is globals()))
spec = __spec__ and __spec__.name
print(json.dumps([sys.argv, os.path.abspath(sys.path[0]), __name__, __file__, spec, __package__, sorted(globals())]))
if "fail" in sys.argv:
    fail()
if "interrupt" in sys.argv:
    raise KeyboardInterrupt
sys.exit(7)
"""

TRAINING = """
import json, os, sys
import deepspeed
import torch

*_, config, output = sys.argv
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
# Under mpirun DeepSpeed asks MPI for everything but the port.
deepspeed.init_distributed(distributed_port=int(os.environ.get("FREE_PORT", 0)))
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
rank = torch.distributed.get_rank()
rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(rank))
losses = []
for _ in range(3):
    loss = engine(rows).square().mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
if rank == 0:
    optimizer = type(engine.basic_optimizer).__name__
    with open(output, "w") as file:
        json.dump([sys.argv, optimizer, torch.distributed.get_world_size(), losses], file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""

CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "AdaiW", "params": {"lr": 0.5}},
    "zero_optimization": {"stage": 2},
}
OWN_ARGUMENTS = ["--opt", "-x", "--help", "--", "key=value"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    for name in ("program.py", "without_suffix", "package/module.py", "folder/__main__.py"):
        (tmp_path / name).write_text(FACTS)
    (tmp_path / "broken.py").write_text("x = (\n")
    (tmp_path / "link.py").symlink_to("package/module.py")
    return tmp_path


def python(folder: Path, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, *arguments]
    finished = subprocess.run(
        command, cwd=folder, env=cli_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    return finished.returncode, finished.stdout, finished.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["program.py", *OWN_ARGUMENTS],
        ["link.py"],
        ["without_suffix", "fail"],
        ["program.py", "interrupt"],
        ["broken.py"],
        ["-m", "package.module", "-m"],
        ["folder", "-m"],
    ],
    ids=" ".join,
)
def test_a_program_behaves_as_under_plain_python(folder: Path, arguments: list[str]) -> None:
    expected = python(folder, *arguments)
    assert expected[0] != 0
    assert python(folder, "-m", "adai_dist", "run", *arguments) == expected


def test_the_installed_command_runs_a_module_from_the_working_directory_and_hides_its_own_frames(folder: Path) -> None:
    start = "import sys; from adai_dist.cli import main; sys.path[0] = '/nowhere'; sys.exit(main())"
    code, out, err = python(folder, "-c", start, "run", "-m", "package.module", "fail")
    assert code == 1
    assert json.loads(out.splitlines()[0])[1] == str(folder)
    assert err.splitlines()[0].startswith("Traceback")
    assert err.count("File ") == 2, err
    assert "runpy" not in err


def test_the_arguments_of_a_launcher_are_split_from_those_of_the_user() -> None:
    assert split_local_rank(["--local_rank=1", "run", "a"]) == (["--local_rank=1"], ["run", "a"])
    assert split_local_rank(["--local-rank=1", "train"]) == (["--local-rank=1"], ["train"])
    assert split_local_rank(["run", "a", "--local_rank=1"]) == ([], ["run", "a", "--local_rank=1"])
    assert split_local_rank([]) == ([], [])


def trained(folder: Path, launcher: list[str], own: list[str]) -> list[Any]:
    """Run the training with a launcher's command, and return its output."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    output = folder / "output.json"
    arguments = [*own, str(folder / "config.json"), str(output)]
    finished = run_command([*launcher, *arguments], FREE_PORT=str(free_port()))
    assert finished.returncode == 0, finished.stderr
    return json.loads(output.read_text())


@pytest.mark.exhaustive
@pytest.mark.deepspeed
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["import", *LAUNCHERS])
def test_a_script_without_the_import_trains_with_adai_under_every_launcher(tmp_path: Path, launcher: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(TRAINING)
    command = [*launch_module(launcher, 2), "adai_dist", "run", str(script)] if launcher != "import" else []
    if launcher == "import":  # imports adai_dist, and so needs no `run`
        script.write_text("import adai_dist\n" + TRAINING)
        command = [*DEEPSPEED, "--num_gpus", "2", "--master_port", str(free_port()), str(script)]
    if launcher == "mpirun":  # without MASTER_ADDR and MASTER_PORT, as users of DeepSpeed start it
        command = [*MPIRUN, "-np", "2", sys.executable, "-m", "adai_dist", "run", str(script)]
    argv, optimizer, num_ranks, losses = trained(tmp_path, command, OWN_ARGUMENTS)
    from_launcher = ["--local_rank=0"] if launcher in ("deepspeed", "import") else []
    assert argv[:-2] == [str(script), *from_launcher, *OWN_ARGUMENTS]
    assert (optimizer, num_ranks) == ("AdaiW", 2)
    assert losses == pytest.approx([0.1080351, 0.0218575, 0.0077711], rel=1e-4)
