"""`phaul check`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phaul.errors import UsageError
from tests.cli.run import assert_error, phaul

pytestmark = pytest.mark.root

# What no machine that can run these tests at all lacks.
EVERYWHERE = ["clone3_set_tid", "external_net_ns", "fdinfo_lock", "mnt_id", "ns_pid", "openat2", "timens", "timerfd"]


def test_all_names_of_criu() -> None:
    assert len(set(phaul("check", "--feature", "list").stdout.split())) == 45
    assert_error(phaul("check", "--feature", "wings"), UsageError, "there is no feature wings")


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_feature_that_is_there(name: str) -> None:
    # As scripts for CRIU call it.
    done = phaul("check", "--no-default-config", "--no-default-config", "-verbosity=0", "--feature", name)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name}: yes\n", "")


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("cgroupns", os.path.exists("/proc/self/ns/cgroup")),
        ("tun", os.path.exists("/dev/net/tun")),
        ("apparmor_stacking", os.path.exists("/sys/kernel/security/apparmor/features/domain/stack")),
    ],
)
def test_a_feature_that_may_be_there(name: str, there: bool) -> None:
    done = phaul("check", "--feature", name)
    assert (done.returncode, done.stdout) == (0, f"{name}: yes\n") if there else (1, f"{name}: no\n")


def test_probes_leave_nothing_behind() -> None:
    def seen() -> tuple[str, set[str], set[str]]:
        mounts = Path("/proc/self/mountinfo").read_text()
        return mounts, set(os.listdir("/sys/class/net")), {n for n in os.listdir("/tmp") if n.startswith("phaul-check")}

    before = seen()
    for name in phaul("check", "--feature", "list").stdout.split():
        done = phaul("check", "--feature", name)
        assert done.returncode in (0, 1), done.stderr
        assert done.stderr == ""
    assert seen() == before
