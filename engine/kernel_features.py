"""Probes of the running kernel by the names that `criu check --feature` gives them.

Every probe tries the thing itself, in a child process that is thrown away: mounts, namespaces and mappings need no
cleaning up. What the names stand for is said at each probe or, where nothing is said, by the system call it makes.
Those about networks are in `engine/kernel_network.py`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from phaul.engine import clocks, kernel, kernel_network, native
from phaul.engine.proc import PAGE_SIZE, Proc

# prctl(2), arch_prctl(2), ioctl_userfaultfd(2), ptrace(2), mount(2), madvise(2), memfd_create(2).
_PR_SET_MM, _PR_SET_MM_MAP_SIZE = 35, 15
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_ARCH_MAP_VDSO_32, _ARCH_MAP_VDSO_64 = 0x2002, 0x2003
_UFFD_NONCOOPERATIVE: Final = 0x2 | 0x4 | 0x8 | 0x40  # EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP
_PTRACE_POKEUSER, _PTRACE_SECCOMP_GET_FILTER, _PTRACE_SETOPTIONS = 6, 0x420C, 0x4200
_DEBUG_REGISTERS: Final = 848  # offsetof(struct user, u_debugreg)
_CLONE_NEWNS: Final = 0x20000
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_SHARED = 0x1000, 0x4000, 1 << 18, 1 << 20
_MOVE_MOUNT_SET_GROUP: Final = 0x100
_MADV_GUARD_INSTALL: Final = 102
_MFD_HUGETLB: Final = 4
_MREMAP_TO: Final = 1 | 2  # MREMAP_MAYMOVE | MREMAP_FIXED

Probe = Callable[[], object]


def has(name: str) -> bool:
    """Whether this kernel has a feature. Raises KeyError for a name that CRIU does not know."""
    probe = FEATURES[name]
    child = os.fork()
    if child == 0:
        there = False
        try:
            there = probe() is not False
        finally:
            os._exit(0 if there else 1)
    return os.waitpid(child, 0)[1] == 0


def _call(name: str, *args: int | bytes | str) -> int:
    """A system call; text and bytes are passed by their address."""
    buffers = [native.buffer(os.fsencode(arg)) if isinstance(arg, (bytes, str)) else None for arg in args]
    words = [buffer.address if buffer else int(arg) for buffer, arg in zip(buffers, args, strict=True)]
    return native.syscall(name, *words)


def _fdinfo_shows(fd: int, text: str) -> bool:
    return text in Path(f"/proc/self/fdinfo/{fd}").read_text()


def _always() -> bool:
    return True


# Processes


def _stopped_child(prepare: Probe = _always) -> int:
    """PID of a child that is seized and stopped; it dies with us."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            prepare()
            os.close(writer)
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    os.read(reader, 1)
    if (status := native.stop([child], native.O_EXITKILL)[0]) < 0:
        raise OSError(-status, os.strerror(-status))
    return child


def _userns() -> None:
    """User namespaces, and PR_SET_MM_MAP, which needs no CAP_SYS_RESOURCE in them."""
    os.stat("/proc/self/ns/user")
    _call("prctl", _PR_SET_MM, _PR_SET_MM_MAP_SIZE, bytes(4), 0, 0)


def _seccomp_suspend() -> None:
    native.ptrace(_PTRACE_SETOPTIONS, _stopped_child(), 0, native.O_EXITKILL | native.O_SUSPEND_SECCOMP)


def _install_filter() -> None:
    allow = native.buffer(struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000))  # BPF_RET, SECCOMP_RET_ALLOW
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, struct.pack("<H6xQ", 1, allow.address), 0, 0)


def _seccomp_filters() -> bool:
    return native.ptrace(_PTRACE_SECCOMP_GET_FILTER, _stopped_child(_install_filter)) > 0


def _get_rseq_conf() -> None:
    native.rseq_configuration(_stopped_child())


def _breakpoints() -> None:
    """A hardware breakpoint on an address of the child's: its debug registers 0 and 7."""
    child = _stopped_child()
    native.ptrace(_PTRACE_POKEUSER, child, _DEBUG_REGISTERS, native.get_registers(child).gpr["ip"])
    native.ptrace(_PTRACE_POKEUSER, child, _DEBUG_REGISTERS + 7 * 8, 1)


def _loginuid() -> None:
    """Unsetting the login uid and setting it again, which audit may have been told to refuse."""
    path = Path("/proc/self/loginuid")
    before = path.read_text()
    path.write_text(str(2**32 - 1))
    path.write_text(before)


def _ns_pid() -> bool:
    return "NSpid" in Proc(os.getpid()).status


def _kcmp_epoll() -> bool:
    """kcmp(2) KCMP_EPOLL_TFD: whether a watched descriptor is a given one."""
    reader, _ = os.pipe()
    epoll = _call("epoll_create1", 0)
    _call("epoll_ctl", epoll, 1, reader, struct.pack("<IQ", 1, 0))  # EPOLL_CTL_ADD, EPOLLIN
    slot = struct.pack("<3I", epoll, reader, 0)
    return _call("kcmp", os.getpid(), os.getpid(), native.KCMP_EPOLL_TFD, reader, slot) == 0


def _pidfd_store() -> None:
    pidfd = os.pidfd_open(os.getpid())
    _call("pidfd_getfd", pidfd, pidfd, 0)


# Memory


def _anonymous_page() -> int:
    return _call("mmap", 0, PAGE_SIZE, 3, 0x22, -1, 0)  # PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS


def _soft_dirty() -> bool:
    """Bit 55 of a written page's pagemap entry (CONFIG_MEM_SOFT_DIRTY)."""
    address = _anonymous_page()
    native.write_memory(os.getpid(), address, b"x")
    word = os.pread(os.open("/proc/self/pagemap", os.O_RDONLY), 8, address // PAGE_SIZE * 8)
    return bool(int.from_bytes(word, "little") >> 55 & 1)


def _map_vdso(code: int) -> None:
    """arch_prctl(2) ARCH_MAP_VDSO_*: EEXIST says that it would be done, were there no vDSO yet."""
    try:
        _call("arch_prctl", code, 0)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise


def _aio_remap() -> None:
    """A ring of io_setup(2) can be moved: its address is its name."""
    context = native.buffer(bytes(8))
    native.syscall("io_setup", 16, context.address)
    (old,) = struct.unpack("<Q", native.read_memory(os.getpid(), context.address, 8))
    size = next(mapping.size for mapping in Proc(os.getpid()).maps() if mapping.start == old)
    place = _call("mmap", 0, size, 3, 0x22, -1, 0)  # PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS
    _call("mremap", old, size, size, _MREMAP_TO, place)
    _call("io_getevents", place, 0, 1, 0, 0)


def _guard_pages() -> bool:
    """PAGEMAP_SCAN tells guard pages (MADV_GUARD_INSTALL) from others."""
    address = _anonymous_page()
    _call("madvise", address, PAGE_SIZE, _MADV_GUARD_INSTALL)
    scanner = native.PageScanner(os.open("/proc/self/pagemap", os.O_RDONLY))
    found = scanner.scan(address, address + PAGE_SIZE, every=native.PAGE_GUARD, ret=native.PAGE_GUARD)
    return scanner.has_scan and bool(found)


# Files and mounts


def _mnt_id() -> bool:
    return _fdinfo_shows(os.open("/", os.O_RDONLY), "mnt_id:")


def _fdinfo_lock() -> bool:
    with tempfile.TemporaryFile() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return _fdinfo_shows(file.fileno(), "lock:")


def _timerfd() -> bool:
    return _fdinfo_shows(_call("timerfd_create", 1, 0), "clockid:")  # CLOCK_MONOTONIC


def _openat2() -> None:
    _call("openat2", -100, "/", struct.pack("<3Q", os.O_PATH, 0, 0), 24)  # AT_FDCWD


@contextlib.contextmanager
def _private_tmpfs() -> Iterator[str]:
    """A new tmpfs that only this process sees; the directory below it goes away again."""
    with tempfile.TemporaryDirectory(prefix="phaul-check-") as directory:
        _call("unshare", _CLONE_NEWNS)
        _call("mount", 0, "/", 0, _MS_REC | _MS_PRIVATE, 0)
        _call("mount", "none", directory, "tmpfs", 0, 0)
        try:
            yield directory
        finally:
            _call("umount2", directory, 2)  # MNT_DETACH


def _autofs() -> bool:
    """The mount option pipe_ino, which tells the pipe of an autofs mount."""
    _, writer = os.pipe()
    with _private_tmpfs() as directory:
        options = f"fd={writer},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
        os.mkdir(f"{directory}/mount")
        _call("mount", "none", f"{directory}/mount", "autofs", 0, options)
        shown = "pipe_ino=" in Path("/proc/self/mountinfo").read_text()
        _call("umount2", f"{directory}/mount", 2)
        return shown


def _move_mount_set_group() -> None:
    """move_mount(2) MOVE_MOUNT_SET_GROUP: a mount joins the peer group of another."""
    with _private_tmpfs() as directory:
        below = f"{directory}/below"
        os.mkdir(below)
        _call("mount", below, below, 0, _MS_BIND, 0)
        _call("mount", 0, directory, 0, _MS_SHARED, 0)
        _call("move_mount", -100, directory, -100, below, _MOVE_MOUNT_SET_GROUP)


def _overlayfs_maps() -> bool:
    """Device and inode in /proc/PID/maps are those of stat(2) on overlayfs, too."""
    with _private_tmpfs() as directory:
        for name in ("lower", "upper", "work", "mount"):
            os.mkdir(f"{directory}/{name}")
        options = f"lowerdir={directory}/lower,upperdir={directory}/upper,workdir={directory}/work"
        _call("mount", "none", f"{directory}/mount", "overlay", 0, options)
        with open(f"{directory}/mount/file", "w+b") as file:
            file.truncate(PAGE_SIZE)
            address = _call("mmap", 0, PAGE_SIZE, 3, 1, file.fileno(), 0)  # MAP_SHARED
            stat = os.fstat(file.fileno())
            mapping = next(mapping for mapping in Proc(os.getpid()).maps() if mapping.start == address)
        _call("munmap", address, PAGE_SIZE)
        return (mapping.device, mapping.inode) == (stat.st_dev, stat.st_ino)


def _apparmor_stacking() -> bool:
    return "yes" in Path("/sys/kernel/security/apparmor/features/domain/stack").read_text()


FEATURES: Final[dict[str, Probe]] = {
    "mnt_id": _mnt_id,
    "mem_dirty_track": _soft_dirty,
    "aio_remap": _aio_remap,
    "timerfd": _timerfd,
    "tun": kernel_network.tun,
    "tun_ns": kernel_network.tun_ns,
    "userns": _userns,
    "fdinfo_lock": _fdinfo_lock,
    "seccomp_suspend": _seccomp_suspend,
    "seccomp_filters": _seccomp_filters,
    "loginuid": _loginuid,
    "cgroupns": lambda: os.stat("/proc/self/ns/cgroup"),
    "autofs": _autofs,
    "tcp_half_closed": kernel_network.tcp_half_closed,
    "compat_cr": lambda: _map_vdso(_ARCH_MAP_VDSO_32),
    "uffd": lambda: kernel.userfaultfd_features() != 0,
    "uffd-noncoop": lambda: kernel.userfaultfd_features() & _UFFD_NONCOOPERATIVE == _UFFD_NONCOOPERATIVE,
    "can_map_vdso": lambda: _map_vdso(_ARCH_MAP_VDSO_64),
    "sk_ns": kernel_network.sk_ns,
    "sk_unix_file": kernel_network.sk_unix_file,
    "net_diag_raw": kernel_network.diag_raw,
    "nsid": kernel_network.nsid,
    "link_nsid": kernel_network.link_nsid,
    "kcmp_epoll": _kcmp_epoll,
    "timens": clocks.supported,
    # A property of CRIU itself, not of the kernel: a tree may live in a network namespace from outside.
    "external_net_ns": _always,
    "clone3_set_tid": kernel.set_tid,
    "newifindex": kernel_network.newifindex,
    "nftables": kernel_network.nftables,
    "has_ipt_legacy": kernel_network.iptables_legacy,
    "pidfd_store": _pidfd_store,
    "ns_pid": _ns_pid,
    "apparmor_stacking": _apparmor_stacking,
    "network_lock_nftables": kernel_network.nftables_concatenation,
    "sockopt_buf_lock": kernel_network.sockopt_buf_lock,
    "memfd_hugetlb": lambda: _call("memfd_create", "phaul", _MFD_HUGETLB),
    "move_mount_set_group": _move_mount_set_group,
    "openat2": _openat2,
    "get_rseq_conf": _get_rseq_conf,
    "ipv6_freebind": kernel_network.ipv6_freebind,
    "pagemap_scan": kernel.pagemap_scan,
    "timer_cr_ids": kernel.timer_restore_ids,
    "overlayfs_maps": _overlayfs_maps,
    "breakpoints": _breakpoints,
    "pagemap_scan_guard_pages": _guard_pages,
}
