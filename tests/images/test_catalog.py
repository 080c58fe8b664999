"""The table of images: names lead to one kind each, and nothing else is a name."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul.errors import ImageError
from phaul.images import catalog
from tests.images.records import NAMES, example_name

RAW = (
    "pages-1",
    "tmpfs-47.tar.gz",
    "tmpfs-dev-47.tar.gz",
    "ifaddr-9",
    "route-9",
    "route6-9",
    "rule-9",
    "iptables-9",
    "ip6tables-9",
    "nftables-9",
    "netns-ct-9",
    "netns-exp-9",
)


@pytest.mark.parametrize("image_type", catalog.TYPES, ids=lambda t: t.pattern)
def test_each_kind_is_found_by_its_name(image_type: catalog.ImageType) -> None:
    name = example_name(image_type)
    assert catalog.lookup(name) is image_type
    assert catalog.image_name(catalog.file_name(name)) == name
    assert not catalog.is_raw(name)


def test_service_files_have_no_suffix() -> None:
    without = [name for name in NAMES if catalog.file_name(name) == name]
    assert without == ["stats-dump", "stats-restore", "irmap-cache"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "core",
        "core-",
        "core-%u",
        "core-01",
        "core-1f3",
        "core--1",
        "core-1\n",
        "core-1/../../etc/passwd",
        "core-\u0661",
        "core-" + "9" * 21,
        "pstree-1",
        "pstree.img",
        "tcp-stream-1F3",
        "tcp-stream-0x1",
        "../pstree",
        "pages-1",
        "stats-x",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ImageError, match="is no kind of image"):
        catalog.lookup(name)


@given(st.text())
def test_any_text_is_a_kind_or_an_image_error(name: str) -> None:
    try:
        catalog.lookup(name)
    except ImageError:
        assert name not in NAMES


@pytest.mark.parametrize("name", RAW)
def test_raw_images_are_known_by_name(name: str) -> None:
    assert catalog.is_raw(name)
    assert catalog.image_name(f"{name}.img") == name


@pytest.mark.parametrize("name", ["pages-x", "pages-1.tar.gz", "tmpfs-47", "pages-shmem-1", "x"])
def test_other_names_are_not_raw(name: str) -> None:
    assert not catalog.is_raw(name)


@pytest.mark.parametrize("file", ["dump.log", "parent", "inventory.img.part", "stats", "img"])
def test_other_files_are_no_images(file: str) -> None:
    assert catalog.image_name(file) is None


def test_importing_the_image_floor_imports_no_schema() -> None:
    code = "import sys, phaul.images.imageset; print([m for m in sys.modules if '_pb2' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("phaul.images.pb")[1:] == []
