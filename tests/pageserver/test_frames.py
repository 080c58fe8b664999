"""The framing: what is packed comes back, and nothing malformed gets through."""

from __future__ import annotations

import random
import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from phaul.errors import PeerError, VersionMismatch
from phaul.images.pagemap import PageRange
from phaul.pageserver import frames
from phaul.pageserver.frames import FrameChecker, Header, Kind, PageFrame, Totals

PAGE = frames.PAGE_SIZE

page_numbers = st.integers(0, (1 << 35) - 1)
some_ranges = st.lists(
    st.builds(lambda page, count: PageRange(page * PAGE, count), page_numbers, st.integers(1, 9)),
    min_size=1,
    max_size=40,
)
targets = st.builds(
    lambda kind, number: f"{kind}{number}",
    st.sampled_from(["pagemap-", "pagemap-shmem-"]),
    st.integers(0, (1 << 32) - 1),
)


def pages_frame(
    ranges: list[PageRange], sequence: int = 0, target: int = 7 << 8 | 1, data: bytes | None = None
) -> bytearray:
    """A sealed PAGES frame; `data` may contradict the ranges."""
    if data is None:
        data = random.Random(1).randbytes(sum(item.size for item in ranges))
    records = frames.pack_ranges(ranges)
    frame = bytearray(frames.HEADER_SIZE) + records + data
    header = Header(Kind.PAGES, len(ranges), len(data), target, sequence, 0)
    frames.seal(memoryview(frame), header)
    return frame


def resealed(frame: bytearray, offset: int, layout: str, value: int) -> bytearray:
    """The frame with one field replaced and the right checksum again."""
    struct.pack_into(layout, frame, offset, value)
    struct.pack_into("<Q", frame, 0, xxhash.xxh3_64_intdigest(bytes(frame[8:])))
    return frame


def accept(frame: bytes | bytearray, checker: FrameChecker | None = None) -> PageFrame | None:
    """Takes a frame as a receiver does."""
    checker = checker or FrameChecker()
    header = checker.header(bytes(frame[: frames.HEADER_SIZE]))
    # A receiver takes what the header says: not all of it, or what comes next, if it lies.
    whole = frames.HEADER_SIZE + header.body_size
    return checker.body(header, memoryview(bytes(frame).ljust(whole, b"\0"))[:whole])


@given(targets)
def test_targets_come_back(name: str) -> None:
    assert frames.decode_target(frames.encode_target(name)) == name


def test_targets_are_numbered_as_in_criu() -> None:
    assert frames.encode_target("pagemap-123") == 123 << 8 | 1
    assert frames.encode_target("pagemap-shmem-7") == 7 << 8 | 2


@pytest.mark.parametrize("name", ["pages-1", "pagemap-", "pagemap--1", "pagemap-1x", "core-1"])
def test_other_images_are_no_targets(name: str) -> None:
    with pytest.raises(ValueError, match="page map"):
        frames.encode_target(name)


@given(some_ranges, targets)
def test_pages_come_back(ranges: list[PageRange], target: str) -> None:
    frame = pages_frame(ranges, target=frames.encode_target(target))
    got = accept(frame)
    assert got is not None
    assert (got.target, got.ranges) == (target, ranges)
    assert bytes(got.data) == bytes(frame[-len(got.data) :])


@given(some_ranges, st.data())
def test_any_changed_bit_is_found(ranges: list[PageRange], data: st.DataObject) -> None:
    frame = pages_frame(ranges)
    bit = data.draw(st.integers(0, len(frame) * 8 - 1))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PeerError, match="page stream: "):
        accept(frame)


@given(st.binary(min_size=frames.HEADER_SIZE, max_size=frames.HEADER_SIZE))
def test_arbitrary_headers_ask_for_bounded_memory_or_fail(raw: bytes) -> None:
    try:
        header = FrameChecker().header(raw)
    except PeerError:
        return
    assert frames.HEADER_SIZE + header.body_size <= frames.MAX_FRAME


@pytest.mark.parametrize(
    ("offset", "layout", "value", "says"),
    [
        (8, "<I", 0, "unknown kind of frame 0"),
        (8, "<I", 77, "unknown kind of frame 77"),
        (8, "<I", Kind.END, "malformed end"),
        (12, "<I", 0, "pages without a range"),
        (12, "<I", frames.MAX_RANGES + 1, "1025 ranges (limit 1024)"),
        (12, "<I", 0xFFFFFFFF, "4294967295 ranges (limit 1024)"),
        (24, "<Q", 1, "frame 1 comes where 0 is due"),
        (32, "<I", frames.MAX_DATA + 1, "4194305 bytes of data (limit 4194304)"),
        (32, "<I", 0xFFFFFFFF, "4294967295 bytes of data (limit 4194304)"),
        (36, "<I", 1, "reserved bytes are not zero"),
    ],
)
def test_headers_out_of_bounds(offset: int, layout: str, value: int, says: str) -> None:
    frame = resealed(pages_frame([PageRange(PAGE, 1)]), offset, layout, value)
    with pytest.raises(PeerError) as caught:
        FrameChecker().header(bytes(frame[: frames.HEADER_SIZE]))
    assert str(caught.value) == f"page stream: {says} (frame 0, offset 0)"


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (pages_frame([PageRange(PAGE + 1, 1)]), "bad range 0x1001 with 1 pages"),
        (pages_frame([PageRange(PAGE, 0)], data=b""), "bad range 0x1000 with 0 pages"),
        (pages_frame([PageRange(1 << 63, 1)]), "bad range 0x8000000000000000 with 1 pages"),
        (
            pages_frame([PageRange(0, 1 << 63)], data=b"x"),
            "bad range 0x0 with 9223372036854775808 pages",
        ),
        (
            pages_frame([PageRange(0, 2)], data=bytes(PAGE)),
            "2 pages announced, 4096 bytes of data",
        ),
        (pages_frame([PageRange(0, 1)], target=7 << 8 | 9), "unknown target 0x709"),
    ],
)
def test_bodies_that_make_no_sense(frame: bytearray, says: str) -> None:
    with pytest.raises(PeerError) as caught:
        accept(frame)
    assert str(caught.value) == f"page stream: {says} (frame 0, offset 0)"


def test_a_stream_counts_and_ends() -> None:
    checker = FrameChecker()
    offset = 0
    for sequence in range(3):
        frame = pages_frame([PageRange(PAGE, sequence + 1)], sequence)
        accept(frame, checker)
        offset += len(frame)
        assert checker.offset == offset
    assert checker.totals == Totals(frames=3, data=6 * PAGE)
    assert accept(frames.pack_end(Totals(3, 6 * PAGE), 3), checker) is None
    assert checker.finished
    with pytest.raises(PeerError, match=r"data after the end \(frame 4"):
        accept(pages_frame([PageRange(PAGE, 1)], 4), checker)


@pytest.mark.parametrize("sequence", [0, 2])
def test_repeated_and_lost_frames(sequence: int) -> None:
    checker = FrameChecker()
    accept(pages_frame([PageRange(PAGE, 1)], 0), checker)
    with pytest.raises(PeerError, match=f"frame {sequence} comes where 1 is due"):
        accept(pages_frame([PageRange(PAGE, 1)], sequence), checker)


def test_totals_that_do_not_agree() -> None:
    checker = FrameChecker()
    accept(pages_frame([PageRange(PAGE, 1)], 0), checker)
    with pytest.raises(PeerError, match=r"Totals\(frames=2, data=4096\) were sent"):
        accept(frames.pack_end(Totals(2, PAGE), 1), checker)


@given(st.binary(min_size=16, max_size=16), st.integers(0, (1 << 32) - 1))
def test_preambles_come_back(token: bytes, version: int) -> None:
    preamble = frames.Preamble(token, version)
    raw = preamble.pack()
    assert len(raw) == frames.PREAMBLE_SIZE
    assert raw.startswith(frames.MAGIC)
    assert frames.Preamble.parse(raw) == preamble


@given(st.binary(min_size=frames.PREAMBLE_SIZE, max_size=frames.PREAMBLE_SIZE))
def test_other_preambles_are_refused(raw: bytes) -> None:
    with pytest.raises(PeerError, match="does not begin as one"):
        frames.Preamble.parse(raw)


def test_answers() -> None:
    frames.check_answer(frames.pack_answer(frames.Status.ACCEPTED))
    with pytest.raises(PeerError, match="does not know this migration"):
        frames.check_answer(frames.pack_answer(frames.Status.UNKNOWN_TOKEN))
    with pytest.raises(VersionMismatch, match="1 here, 2 there"):
        frames.check_answer(struct.pack("<8sII", frames.MAGIC, 2, 0))
    with pytest.raises(PeerError, match="does not answer as a phaul agent"):
        frames.check_answer(b"HTTP/1.1 400 Bad")
