"""The two hosts: what is theirs alone, what joins them, and that nothing of them stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phaul.demo.hosts import Host, TwoHosts

pytestmark = pytest.mark.root

NAMESPACES = ("net", "pid", "mnt", "ipc", "uts")


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Wait for something that the kernel does in its own time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def namespaces_in_use() -> set[str]:
    """All namespaces that some process of this machine is in."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        for name in NAMESPACES:
            try:
                found.add(os.readlink(process / "ns" / name))
            except OSError:
                continue  # ended meanwhile
    return found


def namespaces_of(host: Host) -> set[str]:
    return {os.readlink(f"/proc/{host.init_pid}/ns/{name}") for name in NAMESPACES}


def echo_server(host: Host, tmp_path: Path, family: str) -> int:
    """Start a server in the host that answers one line in capitals; its port."""
    ready = tmp_path / "port"
    program = f"""
import socket
server = socket.create_server(("", 0), family=socket.{family})
print(server.getsockname()[1], flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(connection.recv(100).upper())
    connection.close()
"""
    host.popen([sys.executable, "-c", program], stdout=ready)
    assert eventually(lambda: ready.read_text().endswith("\n"))
    return int(ready.read_text())


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_tcp_between_the_hosts(hosts: TwoHosts, tmp_path: Path, family: str) -> None:
    source, destination = hosts
    port = echo_server(source, tmp_path, family)
    address = source.address if family == "AF_INET" else source.address6

    with destination.connect(address, port) as connection:
        connection.sendall(b"hello")
        assert connection.recv(100) == b"HELLO"


def test_the_machine_does_not_see_the_network(hosts: TwoHosts, tmp_path: Path) -> None:
    port = echo_server(hosts.source, tmp_path, "AF_INET")
    with pytest.raises(ConnectionRefusedError):
        hosts.destination.connect("127.0.0.1", port)
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True)
    assert "link-netns" not in links.stdout


def test_namespaces_are_the_hosts_own(hosts: TwoHosts) -> None:
    source, destination = map(namespaces_of, hosts)
    mine = {os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES}
    assert len(source | destination | mine) == 3 * len(NAMESPACES)


def test_pid_spaces_start_apart_and_are_private(hosts: TwoHosts) -> None:
    source, destination = hosts
    sleeper = source.popen(["sleep", "100"])
    other = destination.popen(["sleep", "100"])

    assert 1000 <= sleeper.pid < 1100
    assert 300 <= other.pid < 400
    assert source.pids() == [sleeper.pid]
    assert destination.pids() == [other.pid]
    status = Path(f"/proc/{sleeper.outer_pid}/status").read_text()
    assert f"NSpid:\t{sleeper.outer_pid}\t{sleeper.pid}\n" in status


def test_proc_run_and_shm_are_private_the_rest_is_shared(hosts: TwoHosts, tmp_path: Path) -> None:
    source, destination = hosts
    places = f"/dev/shm/x /run/x {tmp_path}/x"
    source.run(["sh", "-c", f"touch {places}"], check=True)

    seen = destination.run(["sh", "-c", f"ls {places}"]).stdout.split()
    assert seen == [f"{tmp_path}/x"]
    assert "init.py" in source.run(["cat", "/proc/1/cmdline"]).stdout
    assert source.run(["hostname"]).stdout == "source\n"


def test_a_process_starts_clean(hosts: TwoHosts, tmp_path: Path) -> None:
    """Own session, child of init, three fds of the host's mounts, plain signals."""
    sleeper = hosts.source.popen(["sleep", "100"], stdout=tmp_path / "out", cwd=tmp_path)
    proc = Path(f"/proc/{sleeper.outer_pid}")

    # The loader opens files of its own first.
    assert eventually(lambda: sorted(os.listdir(proc / "fd")) == ["0", "1", "2"])
    links = [os.readlink(proc / "fd" / fd) for fd in "012"]
    assert links == ["/dev/null", f"{tmp_path}/out", f"{tmp_path}/out"]
    mounts = {line.split()[0] for line in hosts.source.run(["cat", "/proc/self/mountinfo"]).stdout.splitlines()}
    for fd in "012":
        info = (proc / "fdinfo" / fd).read_text()
        assert info.split("mnt_id:")[1].split()[0] in mounts
    status = (proc / "status").read_text()
    for field in ("SigIgn", "SigBlk", "SigCgt"):
        assert f"{field}:\t{'0' * 16}\n" in status
    row = hosts.source.run(["ps", "-o", "ppid=,sid=,tty=", "-p", str(sleeper.pid)]).stdout
    assert row.split() == ["1", str(sleeper.pid), "?"]
    assert os.readlink(proc / "cwd") == str(tmp_path)


def test_environment_user_and_stdin(hosts: TwoHosts, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("given\n")
    out, err = tmp_path / "out", tmp_path / "err"
    process = hosts.source.popen(
        ["sh", "-c", "cat; echo $COLOR; id -u; id -G; echo wrong >&2"],
        stdin=tmp_path / "in",
        stdout=out,
        stderr=err,
        env={"COLOR": "blue", "PATH": os.environ["PATH"]},
        uid=12345,
    )
    assert process.wait(10) == 0
    assert out.read_text() == "given\nblue\n12345\n12345\n"
    assert err.read_text() == "wrong\n"


def test_exit_codes(hosts: TwoHosts) -> None:
    source = hosts.source
    assert source.popen(["sh", "-c", "exit 3"]).wait(10) == 3
    sleeper = source.popen(["sleep", "100"])
    assert sleeper.returncode is None
    with pytest.raises(subprocess.TimeoutExpired):
        sleeper.wait(0.01)
    sleeper.kill(signal.SIGTERM)
    assert sleeper.wait(10) == -signal.SIGTERM
    sleeper.kill()  # gone already: nothing happens
    assert sleeper.returncode == -signal.SIGTERM


def test_what_cannot_be_started_says_so(hosts: TwoHosts) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        hosts.source.popen(["no-such-program"])
    with pytest.raises(FileNotFoundError, match="/no/such/input"):
        hosts.source.popen(["true"], stdin="/no/such/input")
    with pytest.raises(subprocess.CalledProcessError):
        hosts.source.run(["false"], check=True)
    with pytest.raises(subprocess.TimeoutExpired):
        hosts.source.run(["sleep", "100"], timeout=0.05)
    assert eventually(lambda: hosts.source.pids() == [])


def test_orphans_are_reaped(hosts: TwoHosts) -> None:
    """The PIDs of a killed tree are free at once: a migration may take them."""
    source = hosts.source
    tree = source.popen(["sh", "-c", "setsid sleep 100 & sleep 100 & sleep 100"])
    assert eventually(lambda: len(source.pids()) == 4)
    pids = source.pids()
    for pid in pids:  # the parent first: the others are orphans then
        source.run(["kill", "-KILL", str(pid)], check=True)
    assert tree.wait(10) == -signal.SIGKILL
    assert eventually(lambda: source.pids() == [])


def test_a_limited_cable(hosts: TwoHosts, tmp_path: Path) -> None:
    source, destination = hosts
    port = echo_server(source, tmp_path, "AF_INET")
    hosts.shape(50_000_000)
    for host in hosts:
        shown = host.run(["tc", "qdisc", "show", "dev", "eth0"], check=True).stdout
        assert "tbf" in shown
        assert "rate 50Mbit" in shown
    with destination.connect(source.address, port) as connection:
        connection.sendall(b"still there")
        assert connection.recv(100) == b"STILL THERE"
    hosts.shape(None)
    assert "tbf" not in source.run(["tc", "qdisc", "show", "dev", "eth0"], check=True).stdout


@pytest.mark.parametrize("offset", [5000, -5000])
def test_clocks_apart(offset: int) -> None:
    with TwoHosts(clock_offset=offset) as hosts:
        clock = [sys.executable, "-c", "import time; print(time.monotonic())"]
        at_source, at_destination = (float(host.run(clock).stdout) for host in hosts)
    assert abs(at_source - at_destination - offset) < 60


def test_parallel_pairs(tmp_path: Path) -> None:
    """The same addresses, ports and PIDs in each pair, and no one hears the other."""
    with TwoHosts() as first, TwoHosts() as second:
        assert first.source.address == second.source.address
        port = echo_server(first.source, tmp_path, "AF_INET")
        with pytest.raises(ConnectionRefusedError):
            second.destination.connect(second.source.address, port)
        first.destination.connect(first.source.address, port).close()


def test_nothing_is_left_after_the_end() -> None:
    with TwoHosts() as hosts:
        processes = [host.popen(["sleep", "100"]).outer_pid for host in hosts]
        processes += [host.init_pid for host in hosts]
        spaces = namespaces_of(hosts.source) | namespaces_of(hosts.destination)
        assert spaces <= namespaces_in_use()

    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    assert not spaces & namespaces_in_use()


def test_nothing_is_left_after_an_exception() -> None:
    def use() -> None:
        with TwoHosts() as hosts:
            inits.extend(host.init_pid for host in hosts)
            raise ZeroDivisionError

    inits: list[int] = []
    with pytest.raises(ZeroDivisionError):
        use()
    assert len(inits) == 2
    assert not [init for init in inits if Path(f"/proc/{init}").exists()]


CREATOR = """
import sys, time
from phaul.demo.hosts import TwoHosts
with TwoHosts() as hosts:
    tree = ["sh", "-c", "setsid sleep 100 & sleep 100"]
    pids = [host.popen(tree).outer_pid for host in hosts]
    print(*pids, *(host.init_pid for host in hosts), flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_after_the_death_of_the_creator(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CREATOR], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as creator:
        assert creator.stdout is not None
        pids = [int(word) for word in creator.stdout.readline().split()]
        assert len(pids) == 4
        spaces = {os.readlink(f"/proc/{pid}/ns/{name}") for pid in pids for name in NAMESPACES}
        assert len(spaces) == 2 * len(NAMESPACES)
        creator.send_signal(number)
        creator.wait(10)

    assert eventually(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()])
    assert eventually(lambda: not spaces & namespaces_in_use())
