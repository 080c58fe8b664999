"""Every kind of image: its file name, its magic, its messages, and the bytes between them.

An image is named by its file name without `.img`: "pstree", "core-123", "tcp-stream-1f3". Two
service files have no suffix on disk either: "stats-dump" and "irmap-cache".

Source: file names and magics of CRIU 4.2 (`criu/image-desc.c`, `criu/include/magic.h`). Old
images, from when each kind of file had its own (`reg-files`, `pipes`, `eventfd`, ...) and each
process had `sigacts-PID`, `itimers-PID` and so on, are in the table too.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import cast

from google.protobuf.message import Message

from phaul.errors import ImageError
from phaul.images import extra

SUFFIX = ".img"

COMMON_MAGIC = 0x54564319
SERVICE_MAGIC = 0x55105940


class Frame(enum.Enum):
    """What an image file begins with, before the magic of its type."""

    COMMON = COMMON_MAGIC
    SERVICE = SERVICE_MAGIC
    BARE = None


@dataclass(frozen=True)
class ImageType:
    """One kind of image.

    Attributes:
        pattern: the image's name; `%u` stands for a decimal, `%x` for a hexadecimal number.
        magic: the u32 that tells the type.
        body: `module.message` of the records, the module without `_pb2`.
        head: the same for the first record where that is another message, else empty.
        frame: what stands before the magic.
        extra_length: how many of the bytes that follow a message belong to it; None when there
            are none. The result may be larger than what is there: then the image is truncated.
        suffix: what the file name has behind the image's name.
    """

    pattern: str
    magic: int
    body: str
    head: str = ""
    frame: Frame = Frame.COMMON
    extra_length: Callable[[Message, memoryview], int] | None = None
    suffix: str = SUFFIX

    def message_class(self, index: int) -> type[Message]:
        """Returns the class of record number `index` (from 0)."""
        return _message_class(self.head if self.head and index == 0 else self.body)


@cache
def _message_class(path: str) -> type[Message]:
    # On demand: the generated modules take about 10 ms each to import.
    module, _, name = path.rpartition(".")
    return cast("type[Message]", getattr(import_module(f"phaul.images.pb.{module}_pb2"), name))


TYPES: tuple[ImageType, ...] = (
    # The image set.
    ImageType("inventory", 0x58313116, "inventory.inventory_entry", frame=Frame.BARE),
    ImageType("pstree", 0x50273030, "pstree.pstree_entry"),
    ImageType("cpuinfo", 0x61404013, "cpuinfo.cpuinfo_entry"),
    ImageType("stats-dump", 0x57093306, "stats.stats_entry", frame=Frame.SERVICE, suffix=""),
    ImageType("stats-restore", 0x57093306, "stats.stats_entry", frame=Frame.SERVICE, suffix=""),
    ImageType("irmap-cache", 0x57004059, "fh.irmap_cache_entry", frame=Frame.SERVICE, suffix=""),
    # Tasks.
    ImageType("core-%u", 0x55053847, "core.core_entry"),
    ImageType("ids-%u", 0x54432030, "core.task_kobj_ids_entry"),
    ImageType("mm-%u", 0x57492820, "mm.mm_entry"),
    ImageType("fs-%u", 0x51403912, "fs.fs_entry"),
    ImageType("vmas-%u", 0x54123737, "vma.vma_entry"),
    ImageType("creds-%u", 0x54023547, "creds.creds_entry"),
    ImageType("sigacts-%u", 0x55344201, "sa.sa_entry"),
    ImageType("signal-s-%u", 0x59255647, "siginfo.siginfo_entry"),
    ImageType("signal-p-%u", 0x59255647, "siginfo.siginfo_entry"),
    ImageType("itimers-%u", 0x57464056, "timer.itimer_entry"),
    ImageType("posix-timers-%u", 0x52603957, "timer.posix_timer_entry"),
    ImageType("rlimit-%u", 0x57113925, "rlimit.rlimit_entry"),
    ImageType("seccomp", 0x64413049, "seccomp.seccomp_entry"),
    ImageType("apparmor", 0x59423047, "apparmor.apparmor_entry"),
    ImageType("cgroup", 0x59383330, "cgroup.cgroup_entry"),
    # Memory.
    ImageType("pagemap-%u", 0x56084025, "pagemap.pagemap_entry", head="pagemap.pagemap_head"),
    ImageType("pagemap-shmem-%u", 0x56084025, "pagemap.pagemap_entry", head="pagemap.pagemap_head"),
    ImageType("memfd", 0x48453499, "memfd.memfd_inode_entry"),
    # Files.
    ImageType("fdinfo-%u", 0x56213732, "fdinfo.fdinfo_entry"),
    ImageType("files", 0x56303138, "fdinfo.file_entry"),
    ImageType("filelocks", 0x54323616, "file_lock.file_lock_entry"),
    ImageType("remap-fpath", 0x59133954, "remap_file_path.remap_file_path_entry"),
    ImageType(
        "ghost-file-%x",
        0x52583605,
        "ghost_file.ghost_chunk_entry",
        head="ghost_file.ghost_file_entry",
        extra_length=extra.ghost_file,
    ),
    ImageType("reg-files", 0x50363636, "regfile.reg_file_entry"),
    ImageType("ext-files", 0x59255641, "ext_file.ext_file_entry"),
    ImageType("ns-files", 0x61394011, "ns.ns_file_entry"),
    ImageType("eventfd", 0x44523722, "eventfd.eventfd_file_entry"),
    ImageType("eventpoll", 0x45023858, "eventpoll.eventpoll_file_entry"),
    ImageType("eventpoll-tfd", 0x44433746, "eventpoll.eventpoll_tfd_entry"),
    ImageType("signalfd", 0x57323820, "signalfd.signalfd_entry"),
    ImageType("timerfd", 0x50493712, "timerfd.timerfd_entry"),
    ImageType("pidfd", 0x54435556, "pidfd.pidfd_entry"),
    ImageType("inotify", 0x48424431, "fsnotify.inotify_file_entry"),
    ImageType("inotify-wd", 0x54562009, "fsnotify.inotify_wd_entry"),
    ImageType("fanotify", 0x55096122, "fsnotify.fanotify_file_entry"),
    ImageType("fanotify-mark", 0x56506035, "fsnotify.fanotify_mark_entry"),
    ImageType("pipes", 0x56513555, "pipe.pipe_entry"),
    ImageType("pipes-data", 0x56453709, "pipe_data.pipe_data_entry", extra_length=extra.pipe_data),
    ImageType("fifo", 0x58364939, "fifo.fifo_entry"),
    ImageType("fifo-data", 0x59333054, "pipe_data.pipe_data_entry", extra_length=extra.pipe_data),
    ImageType("tty", 0x59433025, "tty.tty_file_entry"),
    ImageType("tty-info", 0x59453036, "tty.tty_info_entry"),
    ImageType("tty-data", 0x59413026, "tty.tty_data_entry"),
    ImageType("tunfile", 0x57143751, "tun.tunfile_entry"),
    ImageType("bpfmap-file", 0x57506142, "bpfmap_file.bpfmap_file_entry"),
    ImageType("bpfmap-data", 0x64324033, "bpfmap_data.bpfmap_data_entry", extra_length=extra.bpfmap_data),
    # Sockets.
    ImageType("unixsk", 0x54373943, "sk_unix.unix_sk_entry"),
    ImageType("inetsk", 0x56443851, "sk_inet.inet_sk_entry"),
    ImageType("packetsk", 0x60454618, "packet_sock.packet_sock_entry"),
    ImageType("netlinksk", 0x58005614, "sk_netlink.netlink_sk_entry"),
    ImageType("sk-queues", 0x56264026, "sk_packet.sk_packet_entry", extra_length=extra.sk_queues),
    ImageType("tcp-stream-%x", 0x51465506, "tcp_stream.tcp_stream_entry", extra_length=extra.tcp_stream),
    # Namespaces.
    ImageType("utsns-%u", 0x54473203, "utsns.utsns_entry"),
    ImageType("userns-%u", 0x55474906, "userns.userns_entry"),
    ImageType("timens-%u", 0x43114433, "timens.timens_entry"),
    ImageType("pidns-%u", 0x61157326, "pidns.pidns_entry"),
    ImageType("ipcns-var-%u", 0x53115007, "ipc_var.ipc_var_entry"),
    ImageType("ipcns-shm-%u", 0x46283044, "ipc_shm.ipc_shm_entry", extra_length=extra.ipc_shm),
    ImageType("ipcns-msg-%u", 0x55453737, "ipc_msg.ipc_msg_entry", extra_length=extra.ipc_msg),
    ImageType("ipcns-sem-%u", 0x59573019, "ipc_sem.ipc_sem_entry", extra_length=extra.ipc_sem),
    ImageType("netns-%u", 0x55933752, "netdev.netns_entry"),
    ImageType("netdev-%u", 0x57373951, "netdev.net_device_entry"),
    ImageType("mountpoints-%u", 0x55563928, "mnt.mnt_entry"),
    ImageType("autofs-%u", 0x49353943, "autofs.autofs_entry"),
    ImageType("binfmt-misc", 0x67343323, "binfmt_misc.binfmt_misc_entry"),
    ImageType("binfmt-misc-%u", 0x67343323, "binfmt_misc.binfmt_misc_entry"),
)

# A number has one spelling (no leading zero), so that no two names mean one object.
_DECIMAL = r"(?:0|[1-9][0-9]{0,19})"
_HEXADECIMAL = r"(?:0|[1-9a-f][0-9a-f]{0,15})"
_NUMBERS = {"%u": re.compile(_DECIMAL), "%x": re.compile(_HEXADECIMAL)}


def load_all() -> None:
    """Import the schemas of all images: for those who cannot wait for it later."""
    for image_type in TYPES:
        image_type.message_class(0)


_BY_PATTERN = {image_type.pattern: image_type for image_type in TYPES}

# Images without magic and messages: page contents, and what other programs wrote (tar, ip,
# iptables-save, nft, conntrack).
_RAW = re.compile(
    r"(?:pages|ifaddr|route6?|rule|ip6?tables|nftables|netns-ct|netns-exp)-"
    rf"{_DECIMAL}|tmpfs-(?:dev-)?{_DECIMAL}\.tar\.gz"
)


def lookup(name: str) -> ImageType:
    """Returns the type of the image with this name.

    Raises:
        ImageError: no image is named so. Raw images (`is_raw`) have no type either.
    """
    if name in _BY_PATTERN and "%" not in name:
        return _BY_PATTERN[name]
    stem, _, number = name.rpartition("-")
    for mark, spelling in _NUMBERS.items():
        image_type = _BY_PATTERN.get(f"{stem}-{mark}")
        if image_type is not None and spelling.fullmatch(number):
            return image_type
    raise ImageError(f"{name!r} is no kind of image")


def is_raw(name: str) -> bool:
    """Tells whether this is the name of an image without messages, such as "pages-1"."""
    return _RAW.fullmatch(name) is not None


def file_name(name: str) -> str:
    """Returns the file name of an image. Raises ImageError as `lookup` does."""
    return name + lookup(name).suffix


def image_name(file: str) -> str | None:
    """Returns the image's name for a file of an image directory; None for other files.

    A file that ends in `.img` counts as an image even if no such kind is known: `lookup` of
    the result then says so.
    """
    if file.endswith(SUFFIX):
        return file.removesuffix(SUFFIX)
    bare = [image_type.pattern for image_type in TYPES if not image_type.suffix]
    return file if file in bare else None
