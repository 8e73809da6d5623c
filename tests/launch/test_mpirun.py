"""launch/mpirun.sh on two hosts with sshd, with torch's variables from Open MPI and with DeepSpeed querying MPI."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.launch.hosts import Host
from tests.launch.mpi_mean import PROBLEM
from tests.launch.training import launch, outcome, train_words, world_size
from tests.recipe_runs import ROOT

needs_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or shutil.which("mpirun") is None,
    reason="needs mpirun and mpi4py",
)
pytestmark = [pytest.mark.distributed, needs_mpi]


def mpi(hostfile: Path, ssh_config: Path) -> dict[str, str | Path | int]:
    """Return the settings of the script, with Open MPI's two confirmations for root, the user of the tests."""
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": 1, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": 1}
    options = {"PRTE_MCA_plm_ssh_agent": f"ssh -F {ssh_config}", "OMPI_MCA_btl_tcp_if_include": "eth0"}
    return {"HOSTFILE": hostfile, **options, **as_root}


def test_the_run_ends_with_the_loss_of_one_node(
    two_hosts: list[Host], tmp_path: Path, hostfile: Path, ssh_config: Path, one_node: list[float]
) -> None:
    launch(two_hosts[0], "mpirun.sh", train_words(tmp_path, "two"), **mpi(hostfile, ssh_config))
    assert world_size(tmp_path / "two") == 2
    assert outcome(tmp_path / "two") == one_node


@pytest.mark.parametrize(("engine", "torch_env"), [("fsdp2", 1), ("deepspeed", 0)])
def test_ranks_agree_on_the_mean_with_and_without_deepspeed(
    two_hosts: list[Host], hostfile: Path, ssh_config: Path, engine: str, torch_env: int
) -> None:
    script = [ROOT / "tests/launch/mpi_mean.py", engine]
    words = ["-m", "adai_dist", "run", *script] if engine == "deepspeed" else script
    printed = launch(two_hosts[0], "mpirun.sh", words, TORCH_ENV=torch_env, **mpi(hostfile, ssh_config))
    (names, means) = zip(*json.loads(printed.splitlines()[-1]), strict=True)
    assert names == ("node1", "node2")
    assert means[0] == means[1]
    _, observations = PROBLEM.solve()
    error = max(abs(mean / seen.mean - 1) for mean, seen in zip(means[0], observations, strict=True))
    print(f"{engine}: largest relative error of the mean against float64 {error:.1e}")
    assert len(means[0]) == PROBLEM.steps
    assert error < 1e-6
