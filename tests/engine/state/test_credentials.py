"""Credentials, from one real process into another."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from phaul.engine.proc import Proc
from phaul.engine.state import credentials, death_signal
from phaul.errors import CannotMove, ImageError, RestoreError
from tests.engine.state.lab import Lab, cores, dump, restore

KEYS = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")

TOOLS = """
SETPCAP, NET_RAW, KILL, CHOWN, SYSLOG = 8, 13, 5, 0, 34
def bits(*numbers): return sum(1 << n for n in numbers)
def capset(effective, permitted, inheritable):
    words = [mask >> 32 * i & 0xffffffff for i in (0, 1) for mask in (effective, permitted, inheritable)]
    must(libc.syscall(126, struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *words)))
def prctl(*args): return must(libc.prctl(*args, *[0] * (5 - len(args))))
"""
KINDS = {
    "root": "",
    "a user": TOOLS + "os.setgroups([4, 70000]); os.setresgid(5, 5, 5); os.setresuid(1001, 1001, 1001)",
    "four different ids": TOOLS + "os.setresgid(5, 6, 7); libc.setfsgid(8); os.setresuid(1, 2, 3); libc.setfsuid(4)",
    "no groups": "os.setgroups([])",
    "many groups": "os.setgroups(range(100, 1100))",
    "a user with capabilities": TOOLS
    + """
prctl(24, SYSLOG)
capset(bits(*range(38)) & ~bits(24), bits(*range(38)) & ~bits(24), bits(NET_RAW, KILL))
prctl(28, 1 << 4 | 1 << 2)
os.setresuid(1001, 1001, 1001)
prctl(47, 2, NET_RAW)
prctl(28, 1 << 4 | 1 << 2 | 1 << 7)
capset(bits(NET_RAW), bits(NET_RAW, KILL, CHOWN), bits(NET_RAW, KILL))
prctl(38, 1)
""",
    "inheritable beyond the bounding set": TOOLS
    + "capset(bits(SETPCAP), bits(SETPCAP, SYSLOG), bits(SYSLOG))\nprctl(24, SYSLOG)\ncapset(0, 0, bits(SYSLOG))",
    "root without capabilities": TOOLS + "capset(0, 0, 0)",
    "locked securebits": TOOLS + "prctl(28, 0xff)",
}
END = "\nready(); wait()"


def seen(pid: int) -> dict[str, str]:
    status = Proc(pid).status
    return {key: status[key] for key in KEYS}


@pytest.mark.root
@pytest.mark.parametrize("kind", KINDS)
def test_another_process_becomes_the_same(lab: Lab, kind: str) -> None:
    process, other = lab.stopped(KINDS[kind] + END), lab.stopped(END)
    images = dump(process, credentials)
    restore(other, images, credentials)
    assert seen(other.pid) == seen(process.pid)
    assert cores(dump(other, credentials)) == cores(images)


@pytest.mark.root
def test_each_thread_has_its_own(lab: Lab) -> None:
    threads = (
        TOOLS
        + """
def other():
    BODY
    ready()
    time.sleep(1000)
threading.Thread(target=other, daemon=True).start()
wait()
"""
    )
    process = lab.stopped(
        threads.replace("BODY", "prctl(8, 1); libc.syscall(117, 7, 8, 9); capset(0, bits(CHOWN, KILL), bits(KILL))")
    )
    other = lab.stopped(threads.replace("BODY", "pass"))
    images = dump(process, credentials)
    restore(other, images, credentials)
    assert [core.thread_core.creds.uid for core in cores(images)] == [0, 7]
    assert cores(dump(other, credentials)) == cores(images)


@pytest.mark.root
def test_the_death_signal_outlives_a_change_of_ids(lab: Lab) -> None:
    process = lab.stopped(KINDS["a user"] + "\nprctl(1, 12)" + END)
    other = lab.stopped(END)
    images = dump(process, credentials, death_signal)
    assert cores(images)[0].thread_core.pdeath_sig == 12
    restore(other, images, credentials, death_signal)
    assert cores(dump(other, credentials, death_signal)) == cores(images)

    none = dump(lab.stopped(END), death_signal)
    assert not cores(none)[0].thread_core.HasField("pdeath_sig")


@pytest.mark.root
def test_a_capability_that_we_lack_is_named(lab: Lab) -> None:
    images = dump(lab.stopped(END), credentials)
    have = int(Proc(os.getpid()).status["CapPrm"], 16)
    lacking = next(number for number in (24, 60) if not have >> number & 1)
    cores(images)[0].thread_core.creds.cap_prm[lacking // 32] |= 1 << lacking % 32
    other = lab.stopped(END)
    name = {24: "CAP_SYS_RESOURCE", 60: "CAP_60"}[lacking]
    with pytest.raises(RestoreError, match=f"thread {other.pid} needs {name}, which phaul has not here"):
        restore(other, images, credentials)


@pytest.mark.root
def test_damaged_entries_are_refused(lab: Lab) -> None:
    other = lab.stopped(END)
    images = dump(lab.stopped(END), credentials)
    cores(images)[0].thread_core.creds.cap_eff.append(1)
    with pytest.raises(ImageError, match="capability set of 3 words"):
        restore(other, images, credentials)
    cores(images)[0].thread_core.ClearField("creds")
    with pytest.raises(ImageError, match="credentials are missing"):
        restore(other, images, credentials)


@pytest.mark.root
def test_another_user_namespace_is_refused() -> None:
    with subprocess.Popen(["unshare", "--user", "sleep", "1000"]) as child:
        try:
            ours = os.readlink("/proc/self/ns/user")
            while os.readlink(f"/proc/{child.pid}/ns/user") == ours:
                pass
            with pytest.raises(CannotMove, match=f"user namespace of PID {child.pid}: "):
                credentials.preflight(child.pid)
        finally:
            child.kill()
    credentials.preflight(os.getpid())


def test_the_names_are_those_of_the_kernel() -> None:
    header = Path("/usr/include/linux/capability.h").read_text()
    for number, name in enumerate(credentials.CAPABILITIES):
        assert any(line.split() == ["#define", f"CAP_{name}", str(number)] for line in header.splitlines()), name
