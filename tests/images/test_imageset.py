"""Image sets in memory and in a directory, also when the disk is full."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from phaul.errors import DumpError, ImageError
from phaul.images import catalog
from phaul.images.imageset import ImageSet, begin_directory, read_directory, write_directory
from phaul.images.pb.inventory_pb2 import inventory_entry
from phaul.images.pb.pagemap_pb2 import pagemap_entry, pagemap_head
from phaul.images.pb.pstree_pb2 import pstree_entry
from tests.images.records import NAMES, sample_records


def full_set() -> ImageSet:
    images = ImageSet()
    for name in NAMES:
        for message, extra in sample_records(name):
            images.add(name, message, extra)
    return images


def small_set() -> ImageSet:
    images = ImageSet()
    images.add("inventory", inventory_entry(img_version=2))
    images.add("pstree", pstree_entry(pid=5, ppid=0, pgid=5, sid=5))
    return images


def assert_same(images: ImageSet, others: ImageSet) -> None:
    assert sorted(images.names()) == sorted(others.names())
    for name in images.names():
        assert images.records(name) == others.records(name)


def test_records_messages_and_one() -> None:
    images = small_set()
    assert images.names() == ["inventory", "pstree"]
    assert images.one("inventory", inventory_entry).img_version == 2
    assert images.records("core-1") == []
    assert images.messages("core-1") == []
    images.add("pagemap-5", pagemap_head(pages_id=1))
    images.add("pagemap-5", pagemap_entry(vaddr=0, compat_nr_pages=1))
    assert len(images.messages("pagemap-5")) == 2
    assert [m.vaddr for m in images.messages("pagemap-5", pagemap_entry)] == [0]
    with pytest.raises(ImageError, match="image core-1 is missing"):
        images.one("core-1", pstree_entry)
    images.add("pstree", pstree_entry(pid=6, ppid=5, pgid=5, sid=5))
    with pytest.raises(ImageError, match="pstree has 2 records where one pstree_entry belongs"):
        images.one("pstree", pstree_entry)


def test_only_what_belongs_there_gets_in() -> None:
    images = ImageSet()
    with pytest.raises(ImageError, match="inventory_entry where pstree_entry belongs"):
        images.add("pstree", inventory_entry())
    with pytest.raises(ImageError, match="'pages-1' is no kind of image"):
        images.add("pages-1", inventory_entry())
    with pytest.raises(ImageError, match="pagemap_entry where pagemap_head belongs"):
        images.add("pagemap-1", pagemap_entry())
    assert images.names() == []


def test_a_message_may_be_filled_in_after_it_was_added() -> None:
    images, entry = ImageSet(), pstree_entry()
    images.add("pstree", entry)
    with pytest.raises(ImageError, match="pstree_entry lacks pid"):
        images.encode_file("pstree")
    entry.MergeFrom(pstree_entry(pid=5, ppid=0, pgid=5, sid=5))
    assert images.encode_file("pstree") == small_set().encode_file("pstree")


def test_images_travel_as_their_files(tmp_path: Path) -> None:
    images, there = full_set(), ImageSet()
    write_directory(images, tmp_path)
    for name in images.names():
        data = images.encode_file(name)
        assert data == (tmp_path / catalog.file_name(name)).read_bytes()
        there.decode_file(name, data)
    assert_same(images, there)
    with pytest.raises(ImageError, match="image pstree comes twice"):
        there.decode_file("pstree", images.encode_file("pstree"))
    with pytest.raises(ImageError, match="image core-9 is missing"):
        images.encode_file("core-9")


def test_a_directory_and_back(tmp_path: Path) -> None:
    images = full_set()
    write_directory(images, tmp_path)
    (tmp_path / "dump.log").write_text("not an image")
    (tmp_path / "pages-1.img").write_bytes(b"raw, not for an ImageSet")
    (tmp_path / "parent").symlink_to("../before")
    assert_same(images, read_directory(tmp_path))
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.glob("core-*.img")} == {0o600}


def test_a_newer_set_replaces_an_older_one(tmp_path: Path) -> None:
    write_directory(full_set(), tmp_path)
    newer = small_set()
    newer.add("pstree", pstree_entry(pid=6, ppid=5, pgid=5, sid=5))
    write_directory(newer, tmp_path)
    assert len(read_directory(tmp_path).records("pstree")) == 2


def test_begin_directory_makes_an_older_set_no_set(tmp_path: Path) -> None:
    write_directory(small_set(), tmp_path)
    begin_directory(tmp_path)
    with pytest.raises(ImageError, match=r"holds no image set: inventory\.img is missing"):
        read_directory(tmp_path)


def test_a_set_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    write_directory(small_set(), tmp_path)
    broken = small_set()
    broken.add("fs-5", *sample_records("fs-5")[0])
    broken.add("pstree", pstree_entry())
    with pytest.raises(ImageError, match=r"pstree\.img: record 1: pstree_entry lacks pid"):
        write_directory(broken, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_set_without_inventory_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="image inventory is missing"):
        write_directory(ImageSet(), tmp_path)


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_only_a_directory_can_be_written_to(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "images"
    if kind == "file":
        path.write_text("")
    with pytest.raises(DumpError, match=f"cannot write images to {path}: "):
        write_directory(small_set(), path)
    with pytest.raises(ImageError, match=f"cannot read images from {path}: "):
        read_directory(path)


def test_a_link_at_the_place_of_an_image_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    directory = tmp_path / "images"
    directory.mkdir()
    (directory / "pstree.img").symlink_to(victim)
    with pytest.raises(DumpError, match=r"cannot write .*/pstree\.img: "):
        write_directory(small_set(), directory)
    assert victim.read_text() == "precious"


def test_damaged_directories_are_refused(tmp_path: Path) -> None:
    write_directory(small_set(), tmp_path)
    pstree = tmp_path / "pstree.img"
    whole = pstree.read_bytes()

    pstree.write_bytes(whole[:-1])
    with pytest.raises(ImageError, match=r"^pstree\.img: offset 12: truncated: pstree_entry"):
        read_directory(tmp_path)
    os.truncate(pstree, 1 << 40)  # all of it a hole
    with pytest.raises(ImageError, match=r"pstree\.img has 1099511627776 bytes, too many"):
        read_directory(tmp_path)
    pstree.unlink()
    os.mkfifo(pstree)
    with pytest.raises(ImageError, match=r"pstree\.img is not a regular file"):
        read_directory(tmp_path)
    pstree.unlink()
    pstree.mkdir()
    with pytest.raises(ImageError, match=r"cannot read .*pstree\.img: Is a directory"):
        read_directory(tmp_path)
    pstree.rmdir()
    pstree.symlink_to("nowhere")
    with pytest.raises(ImageError, match=r"cannot read .*pstree\.img: No such file"):
        read_directory(tmp_path)
    pstree.unlink()
    (tmp_path / "amdgpu-kfd-5.img").write_bytes(whole)
    with pytest.raises(ImageError, match="'amdgpu-kfd-5' is no kind of image"):
        read_directory(tmp_path)


# Fills a tmpfs of 64 KiB step by step, and each time tries to write the same set into the rest.
FULL_DISK = """
import json, sys
from pathlib import Path
from phaul.errors import DumpError, ImageError
from phaul.images import catalog
from phaul.images.imageset import ImageSet, read_directory, write_directory
from phaul.images.pb.inventory_pb2 import inventory_entry
from phaul.images.pb.pipe_data_pb2 import pipe_data_entry
from phaul.images.pb.pstree_pb2 import pstree_entry

root = Path(sys.argv[1])
images = ImageSet()
images.add("inventory", inventory_entry(img_version=2))
images.add("pstree", pstree_entry(pid=5, ppid=0, pgid=5, sid=5))
images.add("pipes-data", pipe_data_entry(pipe_id=1, bytes=20000), bytes(20000))
for step in range(17):
    (root / "filler").write_bytes(bytes(4096 * step))
    directory = root / "images"
    directory.mkdir()
    try:
        write_directory(images, directory)
        said = "written"
    except DumpError as error:
        said = str(error)
    left = sorted(path.name for path in directory.iterdir())
    try:
        found = sorted(read_directory(directory).names())
    except ImageError as error:
        found = str(error)
    print(json.dumps([said, left, found]))
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
"""


@pytest.mark.root
def test_a_full_disk_never_leaves_half_a_set(tmp_path: Path) -> None:
    # In a mount namespace of its own, which takes the tmpfs with it when it ends.
    command = 'mount -t tmpfs -o size=64k none "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", tmp_path, sys.executable, FULL_DISK],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 17
    failed_at = set()
    for said, left, found in results:
        if said == "written":
            assert left == ["inventory.img", "pipes-data.img", "pstree.img"]
            assert found == ["inventory", "pipes-data", "pstree"]
        else:
            assert said.startswith(f"cannot write {tmp_path}/images/")
            assert said.endswith(": No space left on device")
            assert left == []
            assert found == f"{tmp_path}/images holds no image set: inventory.img is missing"
            failed_at.add(Path(said.rpartition(": ")[0]).name)
    # Each of the three files was once the one that did not fit, and at first all of them did.
    assert results[0][0] == "written"
    assert failed_at == {"pstree.img", "pipes-data.img", "inventory.img.part"}
