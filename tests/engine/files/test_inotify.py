"""inotify: the entries, numbers of watches, what is watched, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phaul.engine import native
from phaul.engine.state.files.ghost import kernel_device
from phaul.errors import CannotMove, RestoreError
from phaul.images.pb.fdinfo_pb2 import file_entry
from tests.engine.files.holding import Copy, Holder, Options

pytestmark = pytest.mark.root

IN_MODIFY, IN_CREATE, IN_EXCL_UNLINK = 0x2, 0x100, 0x04000000


def inotify() -> int:
    return native.syscall("inotify_init1", os.O_NONBLOCK)


def watch(fd: int, path: Path | str, mask: int) -> int:
    return native.syscall("inotify_add_watch", fd, native.buffer(os.fsencode(path) + b"\0").address, mask)


def marks(fd: int) -> list[str]:
    """What the kernel tells of the watches."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return sorted(line for line in lines if line.startswith("inotify wd"))


def entry(copy: Copy) -> file_entry:
    (found,) = [found for found in copy.images.messages("files", file_entry) if found.HasField("ify")]
    return found


def test_watches_under_their_numbers(holder: Holder, tmp_path: Path) -> None:
    fd = inotify()
    for number in range(1, 8):
        assert watch(fd, tmp_path if number == 5 else "/", IN_CREATE | IN_EXCL_UNLINK) == number
        if number != 5:
            native.syscall("inotify_rm_watch", fd, number)
    (tmp_path / "file").touch()
    assert watch(fd, tmp_path / "file", IN_MODIFY) == 8
    os.read(fd, 1 << 16)
    before = marks(fd)
    holder.give(fd)

    copy = holder.copy()

    assert marks(copy[fd]) == before
    assert len(before) == 2
    with pytest.raises(BlockingIOError):
        os.read(copy[fd], 4096)
    found = entry(copy).ify.wd[0]
    status = tmp_path.stat()
    assert (found.wd, found.i_ino, found.s_dev) == (5, status.st_ino, kernel_device(status.st_dev))
    assert (found.mask, found.f_handle.path) == (IN_CREATE | IN_EXCL_UNLINK, str(tmp_path))
    assert len(found.f_handle.handle) == 16


def test_a_deleted_file_that_is_open(holder: Holder, tmp_path: Path) -> None:
    path = tmp_path / "gone"
    opened, fd = os.open(path, os.O_RDWR | os.O_CREAT), inotify()
    watch(fd, path, IN_MODIFY)
    path.unlink()
    holder.give(opened, fd)

    copy = holder.copy()

    os.write(copy[opened], b"x")
    assert os.read(copy[fd], 4096)[:8] == (1).to_bytes(4, "little") + IN_MODIFY.to_bytes(4, "little")
    assert os.listdir(tmp_path) == []


def test_a_file_with_other_links(holder: Holder, tmp_path: Path) -> None:
    path, fd = tmp_path / "name", inotify()
    path.touch()
    opened = os.open(path, os.O_RDWR)
    watch(fd, path, IN_MODIFY)
    os.link(path, tmp_path / "other")
    path.unlink()
    holder.give(opened, fd)

    copy = holder.copy(Options(link_remap=True))

    (tmp_path / "other").write_bytes(b"x")
    assert os.read(copy[fd], 4096)[:4] == (1).to_bytes(4, "little")
    assert os.listdir(tmp_path) == ["other"]


def test_a_symbolic_link_is_watched_itself(holder: Holder, tmp_path: Path) -> None:
    link, fd = tmp_path / "link", inotify()
    link.symlink_to("/etc")
    watch(fd, link, IN_CREATE | 0x02000000)  # IN_DONT_FOLLOW
    before = marks(fd)
    holder.give(fd)
    assert marks(holder.copy()[fd]) == before


def test_unread_events_are_refused(holder: Holder, tmp_path: Path) -> None:
    fd = inotify()
    watch(fd, tmp_path, IN_CREATE)
    (tmp_path / "new").touch()
    holder.give(fd)
    holder.preflight()
    with pytest.raises(CannotMove, match=f"fd {fd} of PID .*: inotify with 32 bytes of events that were not read"):
        holder.dump()


def test_what_is_missing_here_is_named(holder: Holder, tmp_path: Path) -> None:
    path, fd = tmp_path / "watched", inotify()
    path.mkdir()
    watch(fd, path, IN_CREATE)
    holder.give(fd)
    images, _ = holder.dump()
    path.rmdir()
    with pytest.raises(RestoreError, match=f"{path}: No such file or directory .the source watches it"):
        holder.build(images)


def test_an_impossible_number(holder: Holder, tmp_path: Path) -> None:
    fd = inotify()
    watch(fd, tmp_path, IN_CREATE)
    holder.give(fd)
    images, _ = holder.dump()
    (found,) = [found for found in images.messages("files", file_entry) if found.HasField("ify")]
    found.ify.wd[0].wd = 1 << 30
    with pytest.raises(RestoreError, match="the highest that can be restored"):
        holder.build(images)
