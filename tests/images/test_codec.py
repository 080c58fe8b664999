"""Image files as bytes: every kind goes there and back, and nothing broken comes through."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phaul.errors import ImageError
from phaul.images import catalog, codec
from phaul.images.pb.apparmor_pb2 import apparmor_entry
from phaul.images.pb.pipe_data_pb2 import pipe_data_entry
from phaul.images.pb.pstree_pb2 import pstree_entry
from tests.images.records import NAMES, random_records, sample_records

MIB = 1 << 20

calm = settings(deadline=None, suppress_health_check=list(HealthCheck))


def record_ends(name: str) -> list[int]:
    """Offsets in the sample file at which a record ends, and where the first begins."""
    records = sample_records(name)
    return [len(codec.encode(name, records[:count])) for count in range(len(records) + 1)]


@pytest.mark.parametrize("name", NAMES)
def test_a_full_record_of_every_kind_survives(name: str) -> None:
    records = sample_records(name)
    assert codec.decode(name, codec.encode(name, records)) == records


@pytest.mark.parametrize("name", NAMES)
@settings(calm, max_examples=10)
@given(data=st.data())
def test_random_records_of_every_kind_survive(name: str, data: st.DataObject) -> None:
    records = data.draw(random_records(name))
    encoded = codec.encode(name, records)
    assert codec.decode(name, encoded) == records
    assert codec.encode(name, codec.decode(name, encoded)) == encoded


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_anywhere_but_between_records_is_found(name: str) -> None:
    whole = codec.encode(name, sample_records(name))
    ends = record_ends(name)
    if catalog.lookup(name).head:
        del ends[0]  # such an image is never without its first record
    file = catalog.file_name(name)
    for cut in range(len(whole)):
        if cut in ends:
            assert len(codec.decode(name, whole[:cut])) < len(sample_records(name))
        else:
            with pytest.raises(ImageError, match=rf"^{file}: offset \d+: truncated"):
                codec.decode(name, whole[:cut])


@settings(calm, max_examples=500)
@given(name=st.sampled_from(NAMES), data=st.data())
def test_changed_bytes_give_records_or_an_image_error(name: str, data: st.DataObject) -> None:
    image = bytearray(codec.encode(name, sample_records(name)))
    spots = st.tuples(st.integers(0, len(image) - 1), st.integers(0, 255))
    for offset, value in data.draw(st.lists(spots, min_size=1, max_size=8)):
        image[offset] = value
    try:
        records = codec.decode(name, bytes(image))
    except ImageError as error:
        assert str(error).startswith(f"{catalog.file_name(name)}: offset ")  # noqa: PT017
    else:
        assert all(message.IsInitialized() for message, _ in records)


@settings(calm, max_examples=300)
@given(name=st.sampled_from(NAMES), noise=st.binary(max_size=200))
def test_noise_behind_the_magic_gives_records_or_an_image_error(name: str, noise: bytes) -> None:
    start = codec.encode(name, sample_records(name))[: record_ends(name)[0]]
    try:
        codec.decode(name, start + noise)
    except ImageError as error:
        assert str(error).startswith(f"{catalog.file_name(name)}: offset ")  # noqa: PT017


@pytest.mark.parametrize("name", NAMES)
def test_the_magic_of_another_kind_is_refused(name: str) -> None:
    image = bytearray(codec.encode(name, sample_records(name)))
    for offset in range(record_ends(name)[0]):
        image[offset] ^= 1
        with pytest.raises(ImageError, match="magic 0x"):
            codec.decode(name, bytes(image))
        image[offset] ^= 1


def with_huge_message_size() -> bytes:
    return codec.encode("pstree", []) + b"\xff\xff\xff\xff"


def with_huge_extra(name: str, message_with_length: bytes) -> bytes:
    start = codec.encode(name, sample_records(name))[: record_ends(name)[0]]
    return start + len(message_with_length).to_bytes(4, "little") + message_with_length


U32_MAX = b"\xff\xff\xff\xff\x0f"
U64_MAX = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"
IPC_DESC = b"\x0a\x0e" + b"\x08\0\x10\0\x18\0\x20\0\x28\0\x30\0\x38\0"


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("pstree", with_huge_message_size()),
        ("pipes-data", with_huge_extra("pipes-data", b"\x08\x01\x10" + U32_MAX)),
        ("sk-queues", with_huge_extra("sk-queues", b"\x08\x01\x10" + U32_MAX)),
        ("ipcns-shm-1", with_huge_extra("ipcns-shm-1", IPC_DESC + b"\x10" + U64_MAX)),
        ("ipcns-sem-1", with_huge_extra("ipcns-sem-1", IPC_DESC + b"\x10" + U32_MAX)),
        (
            "ipcns-msg-1",
            with_huge_extra("ipcns-msg-1", IPC_DESC + b"\x10\0\x18" + U32_MAX) + b"\0" * 40,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_huge_length_is_refused_before_anything_is_allocated(name: str, image: bytes) -> None:
    catalog.lookup(name).message_class(0)  # imports are not what is measured
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=r"truncated: .* bytes, \d+ are left"):
            codec.decode(name, image)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_messages_nested_without_end_are_refused() -> None:
    body = b""
    for _ in range(10_000):
        body = b"\x1a" + varint(len(body)) + body  # aa_namespace.namespaces
    body = b"\x0a" + varint(len(body)) + body  # apparmor_entry.namespaces
    image = codec.encode("apparmor", []) + len(body).to_bytes(4, "little") + body
    with pytest.raises(ImageError, match="offset 12: this is no apparmor_entry"):
        codec.decode("apparmor", image)


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def test_a_message_without_a_required_field_is_refused_and_the_field_named() -> None:
    image = codec.encode("pstree", []) + b"\x02\0\0\0" + b"\x08\x07"
    with pytest.raises(ImageError, match=r"^pstree.img: offset 12: .* lacks ppid, pgid, sid$"):
        codec.decode("pstree", image)


def test_what_could_not_be_read_back_is_not_written() -> None:
    with pytest.raises(ImageError, match=r"record 0: pstree_entry lacks pid"):
        codec.encode("pstree", [(pstree_entry(), b"")])
    with pytest.raises(ImageError, match="apparmor_entry where pstree_entry belongs"):
        codec.encode("pstree", [(apparmor_entry(), b"")])
    with pytest.raises(ImageError, match="3 bytes follow, the message tells of 2"):
        codec.encode("pipes-data", [(pipe_data_entry(pipe_id=1, bytes=2), b"abc")])
    with pytest.raises(ImageError, match="1 bytes follow, the message tells of 0"):
        codec.encode("pstree", [(sample_records("pstree")[0][0], b"x")])


def test_every_byte_of_a_small_image() -> None:
    entry = pstree_entry(pid=5, ppid=1, pgid=5, sid=5)
    expected = "1943565430302750080000000805100118052005"
    assert codec.encode("pstree", [(entry, b"")]) == bytes.fromhex(expected)
