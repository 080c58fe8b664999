"""Files that were deleted while they were open: ghosts and link remaps."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from phaul.engine.state.files.ghost import kernel_device
from phaul.errors import CannotMove, ImageError, RestoreError
from phaul.images.imageset import ImageSet
from phaul.images.pb.ghost_file_pb2 import ghost_chunk_entry, ghost_file_entry
from phaul.images.pb.remap_file_path_pb2 import GHOST, LINKED, remap_file_path_entry
from tests.engine.files.holding import Holder, Options

pytestmark = pytest.mark.root

LINK_REMAP = Options(link_remap=True)


def ghost_names(images: ImageSet) -> list[str]:
    return [name for name in images.names() if name.startswith("ghost-file-")]


def deleted(path: Path, content: bytes = b"", flags: int = os.O_RDWR) -> int:
    """A descriptor of a file that has no name any more."""
    path.write_bytes(content)
    fd = os.open(path, flags)
    path.unlink()
    return fd


def test_the_entries(holder: Holder, tmp_path: Path) -> None:
    fd = deleted(tmp_path / "gone", b"content")
    os.fchown(fd, 5, 6)
    status = os.fstat(fd)
    holder.give(fd)

    images, dump = holder.dump()

    (remap,) = images.messages("remap-fpath", remap_file_path_entry)
    assert remap.remap_type == GHOST
    assert images.names().count(f"ghost-file-{remap.remap_id:x}") == 1
    ((ghost, content),) = images.records(f"ghost-file-{remap.remap_id:x}")
    assert isinstance(ghost, ghost_file_entry)
    assert (ghost.uid, ghost.gid, ghost.mode, ghost.size) == (5, 6, status.st_mode, 7)
    assert (ghost.dev, ghost.ino) == (kernel_device(status.st_dev), status.st_ino)
    assert ghost.mtim.tv_sec * 10**6 + ghost.mtim.tv_usec == status.st_mtime_ns // 1000
    assert (ghost.chunks, content) == (False, b"content")
    assert remap.orig_id in dump.ids.values()


def test_content_metadata_and_name(holder: Holder, tmp_path: Path) -> None:
    fd = deleted(tmp_path / "gone", b"content")
    os.fchmod(fd, 0o4711)
    os.utime(fd, ns=(10**18 + 1000, 10**18 + 2000))
    before = os.fstat(fd)
    holder.give(fd)

    copy = holder.copy()

    after = os.fstat(copy[fd])
    assert os.read(copy[fd], 100) == b"content"
    assert (after.st_mode, after.st_uid, after.st_size) == (before.st_mode, before.st_uid, 7)
    assert after.st_mtime_ns == before.st_mtime_ns
    assert after.st_nlink == 0
    assert os.readlink(f"/proc/self/fd/{copy[fd]}") == f"{tmp_path}/gone (deleted)"
    assert os.listdir(tmp_path) == []


def test_one_inode_for_all(holder: Holder, tmp_path: Path) -> None:
    path = tmp_path / "gone"
    path.touch()
    write, read, only_path = os.open(path, os.O_WRONLY), os.open(path, os.O_RDONLY), os.open(path, os.O_PATH)
    path.unlink()
    other = deleted(path)
    holder.give(write, read, only_path, other)

    copy = holder.copy()

    assert len(ghost_names(copy.images)) == 2
    assert len({os.fstat(copy[fd]).st_ino for fd in (write, read, only_path)}) == 1
    assert os.fstat(copy[other]).st_ino != os.fstat(copy[read]).st_ino
    os.write(copy[write], b"new")
    assert os.read(copy[read], 10) == b"new"


@pytest.mark.parametrize("head", [0, 4096])
def test_holes_are_left_out(holder: Holder, tmp_path: Path, head: int) -> None:
    fd = deleted(tmp_path / "gone", b"h" * head)
    os.pwrite(fd, b"middle", 16 << 20)
    os.ftruncate(fd, 64 << 20)
    holder.give(fd)

    copy = holder.copy()

    (name,) = ghost_names(copy.images)
    chunks = copy.images.messages(name, ghost_chunk_entry)
    assert [chunk.off for chunk in chunks] == ([0] if head else []) + [16 << 20]
    assert os.fstat(copy[fd]).st_size == 64 << 20
    assert os.fstat(copy[fd]).st_blocks * 512 <= 16384
    assert os.pread(copy[fd], 7, 16 << 20) == b"middle\0"
    assert os.pread(copy[fd], 5000, 0) == (b"h" * head).ljust(5000, b"\0")


def test_an_empty_sparse_file(holder: Holder, tmp_path: Path) -> None:
    fd = deleted(tmp_path / "gone")
    os.ftruncate(fd, 1 << 30)
    holder.give(fd)
    copy = holder.copy()
    assert os.fstat(copy[fd]).st_size == 1 << 30
    assert os.fstat(copy[fd]).st_blocks == 0


def test_the_limit_is_of_bytes_on_disk(holder: Holder, tmp_path: Path) -> None:
    fd = deleted(tmp_path / "gone", bytes(range(256)) * 32)
    os.fsync(fd)
    holder.give(fd)
    message = f"fd {fd} of PID .*: deleted file {tmp_path}/gone of 8192 bytes, more than --ghost-limit 8191"
    with pytest.raises(CannotMove, match=message):
        holder.preflight(Options(ghost_limit=8191))
    with pytest.raises(CannotMove, match=message):
        holder.dump(Options(ghost_limit=8191))
    holder.preflight(Options(ghost_limit=8192))


def test_a_name_that_is_taken_again(holder: Holder, tmp_path: Path) -> None:
    fd = deleted(tmp_path / "name", b"old")
    (tmp_path / "name").write_bytes(b"new")
    holder.give(fd)

    copy = holder.copy()

    assert os.read(copy[fd], 10) == b"old"
    assert (tmp_path / "name").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["name"]


def test_a_file_that_never_had_a_name(holder: Holder, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"content")
    holder.give(fd)
    copy = holder.copy()
    assert os.pread(copy[fd], 10, 0) == b"content"
    assert os.listdir(tmp_path) == []


def test_directories_and_symbolic_links(holder: Holder, tmp_path: Path) -> None:
    (tmp_path / "above" / "below").mkdir(parents=True, mode=0o711)
    (tmp_path / "link").symlink_to("target")
    directory = os.open(tmp_path / "above" / "below", os.O_RDONLY)
    link = os.open(tmp_path / "link", os.O_PATH | os.O_NOFOLLOW)
    (tmp_path / "above" / "below").rmdir()
    (tmp_path / "above").rmdir()
    (tmp_path / "link").unlink()
    holder.give(directory, link)

    copy = holder.copy()

    assert os.readlink(f"/proc/self/fd/{copy[directory]}") == f"{tmp_path}/above/below (deleted)"
    assert stat.S_ISDIR(os.fstat(copy[directory]).st_mode)
    assert os.readlink("", dir_fd=copy[link]) == "target"
    assert os.listdir(tmp_path) == []


def linked(tmp_path: Path) -> int:
    """A descriptor of a file that was opened as "name" and is called "other" now."""
    path = tmp_path / "name"
    path.write_bytes(b"content")
    fd = os.open(path, os.O_RDWR)
    os.link(path, tmp_path / "other")
    path.unlink()
    return fd


def test_other_links_need_the_option(holder: Holder, tmp_path: Path) -> None:
    fd = linked(tmp_path)
    holder.give(fd)
    message = f"fd {fd} of PID .*: deleted file {tmp_path}/name has other names .hard links.; with --link-remap"
    with pytest.raises(CannotMove, match=message):
        holder.preflight()
    with pytest.raises(CannotMove, match=message):
        holder.dump()
    holder.preflight(LINK_REMAP)
    assert os.listdir(tmp_path) == ["other"]


def test_a_link_for_the_journey(holder: Holder, tmp_path: Path) -> None:
    fd = linked(tmp_path)
    holder.give(fd)

    images, _ = holder.dump(LINK_REMAP)
    (remap,) = images.messages("remap-fpath", remap_file_path_entry)
    assert remap.remap_type == LINKED
    assert sorted(os.listdir(tmp_path)) == [f"link_remap.{remap.remap_id}", "other"]
    holder.stop()
    built = holder.build(images)

    here = built.fds[remap.orig_id]
    assert os.readlink(f"/proc/self/fd/{here}") == f"{tmp_path}/name (deleted)"
    assert os.path.samestat(os.fstat(here), os.stat(tmp_path / "other"))
    assert os.listdir(tmp_path) == ["other"]


def test_the_link_is_taken_back(holder: Holder, tmp_path: Path) -> None:
    holder.give(linked(tmp_path))
    _, dump = holder.dump(LINK_REMAP)
    assert len(os.listdir(tmp_path)) == 2
    dump.undo.close()
    assert os.listdir(tmp_path) == ["other"]


def test_a_missing_link_is_named(holder: Holder, tmp_path: Path) -> None:
    holder.give(linked(tmp_path))
    images, dump = holder.dump(LINK_REMAP)
    dump.undo.close()
    with pytest.raises(RestoreError, match=rf"{tmp_path}/name \(deleted\): .*No such file.*link_remap"):
        holder.build(images)
    assert os.listdir(tmp_path) == ["other"]


def test_images_without_the_ghost(holder: Holder, tmp_path: Path) -> None:
    holder.give(deleted(tmp_path / "gone"))
    images, _ = holder.dump()
    broken = ImageSet()
    for name in images.names():
        if not name.startswith("ghost-file-"):
            broken.decode_file(name, images.encode_file(name))
    with pytest.raises(ImageError, match=r"image ghost-file-\w+ is missing"):
        holder.build(broken)
