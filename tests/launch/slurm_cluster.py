"""A private Slurm cluster in one folder: slurmctld on the first host, slurmd on every host, and munged for both."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

from tests.launch.hosts import Host
from tests.launch.long_run import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
SBIN = ":/usr/sbin:/sbin"  # location of the daemons in Debian
NODE_DOWN_SECONDS = 5  # until an unresponsive node is set down; Slurm's default is 300
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")

_CONFIG = """
ClusterName=adai
SlurmctldHost={first.name}({first.address})
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
ReturnToService=2
SlurmdTimeout={down}
KillWait=5
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MessageTimeout=4
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
"""


def missing() -> str | None:
    """Return why Slurm cannot run on this machine, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + SBIN) is None]
    if absent:
        return f"needs {', '.join(absent)}: apt install slurm-wlm munge"
    if os.geteuid() != 0:
        return "a private Slurm cluster needs root; run the tests as root"
    return None


class Slurm:
    """Slurm cluster on emulated hosts."""

    def __init__(self, hosts: Sequence[Host], folder: Path, environment: Mapping[str, str]) -> None:
        self.hosts, self.folder = hosts, folder
        self.environment = {**environment, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += SBIN
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._configure()
        here = str(self.folder)
        munged = ["munged", "--foreground", "--force", f"--socket={here}/munge.socket", f"--key-file={here}/munge.key"]
        munged += [f"--pid-file={here}/munged.pid", f"--log-file={here}/munged.log", f"--seed-file={here}/munged.seed"]
        self._start(self.hosts[0], [*munged, "--num-threads=2"])
        wait_until((self.folder / "munge.socket").exists, 10, self.output)
        self._start(self.hosts[0], ["slurmctld", "-D"])
        for host in self.hosts:
            self.start_node(host)
        self.wait_for_nodes()

    def start_node(self, host: Host) -> None:
        """Start the daemon of a node."""
        self._start(host, ["slurmd", "-D", "-N", host.name])

    def wait_for_nodes(self, seconds: float = 30) -> None:
        """Wait until all nodes can run jobs."""
        all_idle = {(host.name, "idle") for host in self.hosts}
        wait_until(lambda: self._node_states() == all_idle, seconds, self.output)

    def stop(self) -> None:
        for host in self.hosts:
            host.kill_everything()
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait(10)

    def submit(self, *words: str | Path, cwd: Path, **environment: str) -> str:
        """Submit a job with `sbatch WORDS`, and return its number."""
        return self.ask("sbatch", "--parsable", *words, cwd=cwd, **environment).strip()

    def ask(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """Run a Slurm command on the first host, and return its output."""
        argv = self.hosts[0].command(command, cwd)
        env = {**self.environment, **environment}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.output()}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, seconds: float) -> dict[str, str]:
        """Wait until a job has ended, with or without requeues."""
        wait_until(lambda: self.job(number)["JobState"] in _ENDED, seconds, self.output)
        return self.job(number)

    def output(self) -> str:
        """Return the logs of daemons and jobs, for error messages."""
        logs = [*self.folder.glob("*.log"), *self.folder.rglob("slurm-*.out")]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def _configure(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(256))
        lines = [_CONFIG.format(first=self.hosts[0], folder=self.folder, down=NODE_DOWN_SECONDS)]
        for host in self.hosts:
            (self.folder / f"spool-{host.name}").mkdir()
            lines.append(f"NodeName={host.name} NodeAddr={host.address} CPUs=2 RealMemory=1000 Gres=gpu:8\n")
        names = ",".join(host.name for host in self.hosts)
        lines.append(f"PartitionName=all Nodes={names} Default=YES GraceTime=60 PriorityTier=1\n")
        lines.append(f"PartitionName=urgent Nodes={names} PriorityTier=2\n")
        for k in range(8):  # regular files suffice, as Slurm does not constrain devices here
            (self.folder / f"gpu{k}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "slurm.conf").write_text("".join(lines))

    def _start(self, host: Host, command: list[str]) -> None:
        with (self.folder / f"{host.name}-{command[0]}.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    host.command(command), env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
            )

    def _node_states(self) -> set[tuple[str, str]]:
        argv = self.hosts[0].command(["sinfo", "--noheader", "--Node", "--format=%N %t"])
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        lines = (line.split() for line in done.stdout.splitlines())
        return {(line[0], line[1]) for line in lines if len(line) == 2}


@contextlib.contextmanager
def slurm(hosts: Sequence[Host], folder: Path, environment: Mapping[str, str]) -> Generator[Slurm, None, None]:
    """Run a cluster on these hosts; at the end, stop it and kill all processes on them."""
    cluster = Slurm(hosts, folder, environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
