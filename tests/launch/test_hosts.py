"""The emulated hosts of the launcher tests behave as hosts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.hosts import Host, hosts, missing

LISTEN = """
import socket
server = socket.create_server(("", 4000))
print("ready", flush=True)
while True:
    connection, (address, _) = server.accept()
    connection.sendall(f"{socket.gethostname()} {address}".encode())
    connection.close()
"""
CONNECT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1) as connection:
    print(connection.recv(100).decode())
"""


def test_hosts_have_names_and_addresses_and_reach_each_other_until_one_is_disconnected(two_hosts: list[Host]) -> None:
    first, second = two_hosts
    assert [host.run(["hostname"]).stdout.split() for host in two_hosts] == [["node1"], ["node2"]]
    listen(second)
    assert ask(first, "node2").stdout.split() == ["node2", first.address]
    assert ask(second, "127.0.0.1").stdout.split() == ["node2", "127.0.0.1"]
    second.cut_off()
    cut = ask(first, second.address)
    assert cut.returncode != 0
    assert "timed out" in cut.stderr or "No route to host" in cut.stderr
    second.reconnect()
    assert ask(first, "node2").returncode == 0
    second.kill_everything()
    assert second.processes() == []
    assert "refused" in ask(first, "node2").stderr


def test_hosts_reach_nothing_else_and_run_commands_in_the_working_directory(
    two_hosts: list[Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = two_hosts[0]
    away = ask(first, "192.0.2.1")
    assert "unreachable" in away.stderr
    assert first.run(["pwd"]).stdout.strip() == str(tmp_path)
    ended = first.run(["sh", "-c", 'exit "$CODE"'], env={**os.environ, "CODE": "143"})
    assert ended.returncode == 143
    with pytest.raises(AssertionError, match=r"still running after 0\.2 s"):
        first.run(["sleep", "60"], timeout=0.2)
    assert first.processes() == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_hosts_of_a_killed_test_disappear(how: signal.Signals) -> None:
    if missing():
        pytest.skip(missing() or "")
    program = (
        "import time\n"
        "from tests.launch.hosts import hosts\n"
        "with hosts(2) as made:\n"
        "    made[1].popen(['sh', '-c', 'setsid sleep 1000 & sleep 1000'])\n"
        "    while len(made[1].processes()) < 3:\n"
        "        time.sleep(0.001)\n"
        "    print(made[1].pid, *made[1].processes(), flush=True)\n"
        "    time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 4
        assert all(is_running(pid) for pid in pids)
        process.send_signal(how)
    wait_until_gone(pids)


def test_hosts_of_two_sessions_are_isolated() -> None:
    if missing():
        pytest.skip(missing() or "")
    with hosts(3) as ours, hosts(3) as others:
        listen(ours[2])
        assert ask(ours[0], "node3").stdout.split() == ["node3", ours[0].address]
        assert "refused" in ask(others[0], "node3").stderr
        keepers = [host.pid for host in (*ours, *others)]
    wait_until_gone(keepers)


def listen(host: Host) -> None:
    process = host.popen([sys.executable, "-I", "-c", LISTEN], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"


def ask(host: Host, address: str, port: int = 4000) -> subprocess.CompletedProcess[str]:
    return host.run([sys.executable, "-I", "-c", CONNECT, address, str(port)])


def wait_until_gone(pids: list[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{pids} are still running"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # zombie of a killed test, adopted by a process that does not reap it
