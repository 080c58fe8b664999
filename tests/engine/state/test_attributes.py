"""The small kinds of state: names, limits, scheduling and so on, from one real process into another."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from phaul.engine import native
from phaul.engine.native import Registers
from phaul.engine.proc import Proc
from phaul.engine.state import (
    limits,
    membarrier,
    names,
    registry,
    rseq,
    scheduling,
    seccomp,
    task,
    thread_area,
)
from phaul.errors import CannotMove, ImageError, NoSuchProcess, RestoreError
from phaul.images.pb.core_pb2 import core_entry
from phaul.images.pb.seccomp_pb2 import seccomp_entry
from tests.engine.state.lab import Lab, cores, dump, restore

END = "\nready(); wait()"
THREADED = """
def body():
    BODY
    ready()
    time.sleep(1000)
threading.Thread(target=body, daemon=True).start()
wait()
"""


def moved(lab: Lab, script: str, other: str, *modules: ModuleType) -> list[core_entry]:
    """The entries of a process, which another one turned out to have as well."""
    images = dump(lab.stopped(script), *modules)
    process = lab.stopped(other)
    restore(process, images, *modules)
    assert [str(core) for core in cores(dump(process, *modules))] == [str(core) for core in cores(images)]
    return cores(images)


# Names


@pytest.mark.root
@pytest.mark.parametrize(
    "name", [b"a", b"fifteen letters", b"sp ace)(", "schön".encode(), b"cut \xe6\x97", b"end\n", b""]
)
def test_names(lab: Lab, name: bytes) -> None:
    body = f"libc.prctl(15, {name!r}, 0, 0, 0)"
    leader, thread = moved(lab, THREADED.replace("BODY", body), THREADED.replace("BODY", "pass"), names)
    assert names.get_bytes(thread.thread_core, "comm") == name
    again = core_entry()
    again.ParseFromString(thread.SerializePartialToString())
    assert names.get_bytes(again.thread_core, "comm") == name
    assert not thread.HasField("tc")
    assert names.get_bytes(leader.tc, "comm") == names.get_bytes(leader.thread_core, "comm") != name


@pytest.mark.root
def test_a_name_that_no_kernel_has_is_refused(lab: Lab) -> None:
    process = lab.stopped(END)
    images = dump(process, names)
    cores(images)[0].thread_core.comm = "sixteen letters!"
    with pytest.raises(ImageError, match="name of 16 bytes"):
        restore(process, images, names)


# Limits


@pytest.mark.root
def test_limits(lab: Lab) -> None:
    lower = """
import resource
for number in range(16):
    soft, hard = resource.getrlimit(number)
    if number not in (13, 14):  # RLIMIT_NICE and RLIMIT_RTPRIO are 0
        most = 2**33 + number if hard == -1 else hard
        resource.setrlimit(number, (most - 20 - number, most - number))
"""
    (core,) = moved(lab, lower + END, END, limits)
    found = [(limit.cur, limit.max) for limit in core.tc.rlimits.rlimits]
    assert [hard - soft for soft, hard in found] == [0 if number in (13, 14) else 20 for number in range(16)]
    assert found[limits.NAMES.index(("RLIMIT_FSIZE", "Max file size"))] == (2**33 - 20, 2**33)


@pytest.mark.root
def test_limits_are_those_of_the_kernel(lab: Lab) -> None:
    found = limits.limits_of(Proc(os.getpid()))
    for number in range(16):
        words = tuple(limit & (1 << 64) - 1 for limit in resource.prlimit(0, number))
        assert found[number] == words, limits.NAMES[number]


@pytest.mark.root
def test_a_limit_that_cannot_be_raised_is_named_with_both_values(lab: Lab) -> None:
    images = dump(lab.stopped(END), limits)
    entry = cores(images)[0].tc.rlimits.rlimits[4]
    entry.cur, entry.max = 10, 5  # soft above hard: no privilege helps
    process = lab.stopped("import resource\nresource.setrlimit(4, (1, 7))" + END)
    message = f"RLIMIT_CORE of PID {process.pid} cannot be set from 1:7 to 10:5 \\(soft:hard\\): "
    with pytest.raises(RestoreError, match=message):
        restore(process, images, limits)


# Scheduling


@pytest.mark.root
@pytest.mark.parametrize(
    ("policy", "priority", "nice"),
    [
        (os.SCHED_OTHER, 0, 7),
        (os.SCHED_OTHER, 0, -5),
        (os.SCHED_BATCH, 0, 3),
        (os.SCHED_IDLE, 0, 19),
        (os.SCHED_FIFO, 3, 0),
        (os.SCHED_RR | os.SCHED_RESET_ON_FORK, 4, 0),
    ],
)
def test_scheduling(lab: Lab, policy: int, priority: int, nice: int) -> None:
    body = f"os.setpriority(0, 0, {nice}); os.sched_setscheduler(0, {policy}, os.sched_param({priority}))"
    leader, thread = moved(lab, THREADED.replace("BODY", body), THREADED.replace("BODY", "pass"), scheduling)
    entry = thread.thread_core
    assert (entry.sched_policy, entry.sched_prio, entry.sched_nice) == (policy, priority, nice)
    assert (leader.thread_core.sched_policy, leader.thread_core.sched_nice) == (os.SCHED_OTHER, 0)


@pytest.mark.root
def test_cpu_affinity(lab: Lab) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    body = f"os.sched_setaffinity(0, {{{cpus[-1]}}})"
    leader, thread = moved(lab, THREADED.replace("BODY", body), THREADED.replace("BODY", "pass"), scheduling)
    assert int.from_bytes(thread.thread_core.cpu_affinity, "little") == 1 << cpus[-1]
    assert leader.thread_core.HasField("cpu_affinity") == (len(cpus) < (os.cpu_count() or 1))


@pytest.mark.root
def test_cpus_that_are_not_here_are_left_out(lab: Lab) -> None:
    process = lab.stopped(END)
    images = dump(process, scheduling)
    here = min(os.sched_getaffinity(0))
    for foreign, wanted in (({4000, here}, {here}), ({4000}, {here})):
        cores(images)[0].thread_core.cpu_affinity = sum(1 << cpu for cpu in foreign).to_bytes(512, "little")
        restore(process, images, scheduling)
        assert os.sched_getaffinity(process.pid) == wanted


@pytest.mark.root
def test_a_policy_that_the_kernel_refuses_is_named(lab: Lab) -> None:
    process = lab.stopped(END)
    images = dump(process, scheduling)
    entry = cores(images)[0].thread_core
    entry.sched_policy, entry.sched_prio = os.SCHED_FIFO, 200
    with pytest.raises(RestoreError, match=rf"thread {process.pid} cannot get SCHED_FIFO, nice 0, priority 200: "):
        restore(process, images, scheduling)


@pytest.mark.root
def test_deadline_scheduling_is_refused(lab: Lab) -> None:
    deadline = "must(libc.syscall(314, 0, struct.pack('IIQiI3Q', 48, 6, 0, 0, 0, 10**6, 10**7, 10**7), 0))"
    target = lab.start(deadline + END)
    with pytest.raises(CannotMove, match=rf"scheduling policy 6 of thread {target.pid} of PID {target.pid}: "):
        scheduling.preflight(target.pid)
    with pytest.raises(CannotMove, match="scheduling policy 6"):
        dump(lab.freeze(target).root, scheduling)


# Task


@pytest.mark.root
def test_task(lab: Lab) -> None:
    (core,) = moved(
        lab,
        "must(libc.prctl(36, 1, 0, 0, 0)); libc.personality(0x40000)\n"
        "open('/proc/self/oom_score_adj', 'w').write('321')" + END,
        END,
        task,
    )
    tc = core.tc
    assert (tc.task_state, tc.exit_code, tc.personality) == (task.ALIVE, 0, 0x40000)
    assert (tc.oom_score_adj, tc.child_subreaper) == (321, True)


@pytest.mark.root
def test_a_better_oom_score_than_ours_may_be_refused(lab: Lab) -> None:
    images = dump(lab.stopped(END), task)
    cores(images)[0].tc.oom_score_adj = -1001
    process = lab.stopped(END)
    with pytest.raises(RestoreError, match=rf"oom_score_adj of PID {process.pid} cannot be set from -?\d+ to -1001: "):
        restore(process, images, task)


@pytest.mark.root
def test_a_traced_process_is_refused(lab: Lab) -> None:
    process = lab.stopped(END)
    with pytest.raises(CannotMove, match=f"process of PID {process.pid}: is traced by PID {os.getpid()}"):
        task.preflight(process.pid)


# Seccomp


@pytest.mark.root
def test_filters_in_common_stand_once(lab: Lab) -> None:
    allow_all = (
        "code = struct.pack('HBBI', 6, 0, 0, 0x7fff0000)\n"
        "buffer = ctypes.create_string_buffer(code)\n"
        "must(libc.prctl(38, 1, 0, 0, 0))\n"
        "def install(): must(libc.prctl(22, 2, struct.pack('H6xQ', 1, ctypes.addressof(buffer)), 0, 0))\n"
        "install()\n"
        "install()\n"
    )
    target = lab.start(allow_all + END)
    images = dump(lab.freeze(target).root, seccomp)
    filters = images.one("seccomp", seccomp_entry).seccomp_filters
    assert [(item.HasField("prev"), item.prev, len(item.filter)) for item in filters] == [(False, 0, 8), (True, 0, 8)]
    core = images.one(f"core-{target.pid}", core_entry).thread_core
    assert (core.seccomp_mode, core.seccomp_filter) == (2, 1)


# Membarrier


@pytest.mark.root
@pytest.mark.parametrize("kernel_tells", [True, False])
def test_membarrier(lab: Lab, monkeypatch: pytest.MonkeyPatch, kernel_tells: bool) -> None:
    if not kernel_tells:
        monkeypatch.setattr(membarrier, "_kernel_tells", lambda: False)
    (core,) = moved(lab, "must(libc.syscall(324, 16, 0, 0)); must(libc.syscall(324, 64, 0, 0))" + END, END, membarrier)
    assert core.tc.membarrier_registration_mask == 16 | 64
    (core,) = moved(lab, END, END, membarrier)
    assert not core.tc.HasField("membarrier_registration_mask")


# Addresses of a thread


@pytest.mark.root
def test_tid_address_and_robust_list(lab: Lab) -> None:
    body = "libc.syscall(218, 0x12345678); must(libc.syscall(273, 0x7654320, 24))"
    leader, thread = moved(lab, THREADED.replace("BODY", body), THREADED.replace("BODY", "pass"), thread_area)
    assert thread.thread_info.clear_tid_addr == 0x12345678
    assert (thread.thread_core.futex_rla, thread.thread_core.futex_rla_len) == (0x7654320, 24)
    assert leader.thread_core.futex_rla not in (0, 0x7654320)


# Restartable sequences

NO_RSEQ = ("env", "GLIBC_TUNABLES=glibc.pthread.rseq=0")
OWN_RSEQ = """
area = ctypes.create_string_buffer(4096)
address = (ctypes.addressof(area) + 63) & -64
must(libc.syscall(334, ctypes.c_void_p(address), 32, 0, 0x53053053))
"""


@pytest.mark.root
def test_rseq(lab: Lab) -> None:
    process = lab.stopped(OWN_RSEQ + END, *NO_RSEQ)
    other = lab.stopped(END, *NO_RSEQ)
    assert rseq.configuration(other.pid, other.pid) is None
    images = dump(process, rseq)
    entry = cores(images)[0].thread_core.rseq_entry
    assert (entry.rseq_abi_size, entry.signature) == (32, 0x53053053)
    entry.rseq_abi_pointer = writable(other.pid)
    restore(other, images, rseq)
    assert rseq.configuration(other.pid, other.pid) == (entry.rseq_abi_pointer, 32, 0x53053053)


def writable(pid: int) -> int:
    """The end of the heap: mapped, and nobody uses it."""
    heap = next(mapping for mapping in Proc(pid).maps() if mapping.path == b"[heap]")
    return heap.end - 4096


@pytest.mark.root
def test_a_thread_without_rseq_has_no_entry(lab: Lab) -> None:
    (core,) = cores(dump(lab.stopped(END, *NO_RSEQ), rseq))
    assert not core.thread_core.HasField("rseq_entry")


@pytest.mark.root
def test_a_size_that_the_kernel_does_not_take_is_named(lab: Lab) -> None:
    process = lab.stopped(END, *NO_RSEQ)
    images = dump(process, rseq)
    entry = cores(images)[0].thread_core.rseq_entry
    entry.rseq_abi_pointer, entry.rseq_abi_size, entry.signature = writable(process.pid), 7, 1
    with pytest.raises(RestoreError, match=rf"rseq area of thread {process.pid} \(7 bytes at 0x"):
        restore(process, images, rseq)


@pytest.mark.root
@pytest.mark.parametrize(("place", "aborts"), [(-1, False), (0, True), (31, True), (32, False)])
def test_a_critical_section_is_left_by_its_abort_handler(lab: Lab, place: int, aborts: bool) -> None:
    process = lab.stopped(OWN_RSEQ + END, *NO_RSEQ)
    configuration = rseq.configuration(process.pid, process.pid)
    assert configuration is not None
    section, start, handler = configuration[0] + 64, 0x400000, 0x500000
    native.write_memory(process.pid, section, struct.pack("<II3Q", 0, 0, start, 32, handler))
    native.write_memory(process.pid, configuration[0] + 8, struct.pack("<Q", section))
    before = process.threads[0].regs
    inside = Registers(before.gpr | {"ip": start + place}, before.xstate, before.sigmask)
    after = rseq.aborted(process.pid, process.pid, inside)
    assert after == (Registers(before.gpr | {"ip": handler}, before.xstate, before.sigmask) if aborts else inside)


@pytest.mark.root
def test_outside_of_a_critical_section_nothing_is_changed(lab: Lab) -> None:
    for wrapper in ((), NO_RSEQ):
        process = lab.stopped(END, *wrapper)
        registers = process.threads[0].regs
        assert rseq.aborted(process.pid, process.pid, registers) is registers


# Registry


def test_every_module_of_state_is_registered() -> None:
    folder = Path(registry.__file__).parent
    # phaul.engine.dump, restore and state.fds call these.
    handled_elsewhere = {"registry", "__init__", "mm", "fs", "fds", "locks", "zombie"}
    found = {path.stem for path in folder.glob("*.py")} - handled_elsewhere
    assert found == {module.__name__.rpartition(".")[2] for module in registry.PROCESS + registry.THREAD}


def test_modules_stand_where_they_are_used() -> None:
    for level, modules in (("process", registry.PROCESS), ("thread", registry.THREAD)):
        for module in modules:
            assert hasattr(module, f"dump_{level}"), module
        for module in set(registry.PROCESS + registry.THREAD) - set(modules):
            assert not hasattr(module, f"dump_{level}"), module
            assert not hasattr(module, f"restore_{level}"), module


@pytest.mark.root
def test_preflight_takes_an_ordinary_process(lab: Lab) -> None:
    registry.preflight(lab.start(END).pid)


def test_preflight_of_a_process_that_has_gone() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(NoSuchProcess):
        registry.preflight(process.pid)
