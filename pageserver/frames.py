"""phaul's page framing: bytes to values and back, without any I/O.

One stream carries the page contents of one migration, source to destination:

    source:       Preamble   Frame Frame ... Frame(END)
    destination:  Answer

`docs/formats.md` has the byte tables. A frame is contiguous (header, ranges, data), and its
checksum comes first and covers all that follows, so both sides hash one buffer in one call.
All integers are little-endian.

What arrives is hostile until checked here: sizes against fixed bounds before anything is
allocated or read, ranges against the size of the data, the checksum over all of it, the sequence
number against the one expected. Whether the *addresses* make sense is for the engine to say: it
knows the maps of the tree.
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

from phaul.errors import PeerError, VersionMismatch
from phaul.images.pagemap import PageRange

MAGIC = b"\x89phaul\r\n"  # a high bit and a line end: any text transport breaks it visibly
VERSION = 1
TOKEN_SIZE = 16

PAGE_SIZE = 4096
MAX_DATA = 4 << 20
# One page a range is the worst case; 1024 is also the limit of an iovec (IOV_MAX, readv(2)).
MAX_RANGES = MAX_DATA // PAGE_SIZE

_PREAMBLE = struct.Struct("<8sII16s")
_ANSWER = struct.Struct("<8sII")
_HEADER = struct.Struct("<QIIQQII")
_RANGE = struct.Struct("<QQ")
_TOTALS = struct.Struct("<QQ")
_CHECKSUM = struct.Struct("<Q")

PREAMBLE_SIZE = _PREAMBLE.size
ANSWER_SIZE = _ANSWER.size
HEADER_SIZE = _HEADER.size
RANGE_SIZE = _RANGE.size
TOTALS_SIZE = _TOTALS.size
CHECKSUM_SIZE = _CHECKSUM.size
MAX_FRAME = HEADER_SIZE + MAX_RANGES * RANGE_SIZE + MAX_DATA


class Status(enum.IntEnum):
    """The destination's answer to a preamble."""

    ACCEPTED = 0
    UNKNOWN_TOKEN = 1
    BAD_VERSION = 2


class Kind(enum.IntEnum):
    """What a frame carries."""

    PAGES = 1
    END = 2


class TargetType(enum.IntEnum):
    """Whose pages they are: the low byte of a target, as in CRIU's `dst_id`."""

    PROCESS = 1
    SHMEM = 2


_TARGET_NAMES = {TargetType.PROCESS: "pagemap-", TargetType.SHMEM: "pagemap-shmem-"}
_TARGET_NAME = re.compile(r"pagemap-(?P<shmem>shmem-)?(?P<id>[0-9]+)")


def encode_target(name: str) -> int:
    """`pagemap-123` or `pagemap-shmem-7` as the wire's `id << 8 | type`.

    Raises:
        ValueError: not the name of a page map.
    """
    match = _TARGET_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a page map")
    kind = TargetType.SHMEM if match["shmem"] else TargetType.PROCESS
    return int(match["id"]) << 8 | kind


def decode_target(target: int) -> str:
    """The page map that a target on the wire means.

    Raises:
        ValueError: the low byte is no known type.
    """
    return f"{_TARGET_NAMES[TargetType(target & 0xFF)]}{target >> 8}"


@dataclass(frozen=True)
class Preamble:
    """First bytes of a page stream: who it belongs to.

    Attributes:
        token: the migration's token, TOKEN_SIZE bytes.
        version: of the framing.
    """

    token: bytes
    version: int = VERSION

    def pack(self) -> bytes:
        """PREAMBLE_SIZE bytes."""
        return _PREAMBLE.pack(MAGIC, self.version, 0, self.token)

    @classmethod
    def parse(cls, raw: bytes) -> Preamble:
        """From PREAMBLE_SIZE bytes.

        Raises:
            PeerError: not a page stream.
        """
        magic, version, reserved, token = _PREAMBLE.unpack(raw)
        if magic != MAGIC or reserved:
            raise PeerError("page stream: it does not begin as one")
        return cls(token, version)


def pack_answer(status: Status) -> bytes:
    """The destination's ANSWER_SIZE bytes."""
    return _ANSWER.pack(MAGIC, VERSION, status)


def check_answer(raw: bytes) -> None:
    """Look at the destination's answer.

    Raises:
        VersionMismatch: it speaks another version of the framing.
        PeerError: it is no page receiver, or does not know the token.
    """
    magic, version, status = _ANSWER.unpack(raw)
    if magic != MAGIC:
        raise PeerError("page stream: the other side does not answer as a phaul agent")
    if version != VERSION or status == Status.BAD_VERSION:
        raise VersionMismatch(f"page stream version: {VERSION} here, {version} there")
    if status != Status.ACCEPTED:
        raise PeerError("page stream: the destination does not know this migration")


@dataclass(frozen=True)
class Header:
    """The fixed part of a frame.

    Attributes:
        kind: see `Kind`.
        nr_ranges: records of RANGE_SIZE bytes that follow.
        data_size: bytes that follow the ranges.
        target: `encode_target()`; 0 in END.
        sequence: 0 for the first frame of a stream, then one more each.
        checksum: xxh3-64 of the frame from byte CHECKSUM_SIZE on.
    """

    kind: Kind
    nr_ranges: int
    data_size: int
    target: int
    sequence: int
    checksum: int

    @property
    def ranges_size(self) -> int:
        """Bytes of the range records."""
        return self.nr_ranges * RANGE_SIZE

    @property
    def body_size(self) -> int:
        """Bytes that follow the header."""
        return self.ranges_size + self.data_size


@dataclass(frozen=True)
class PageFrame:
    """The contents of a verified PAGES frame.

    Attributes:
        target: name of the page map.
        ranges: not empty, each at least one page, addresses page-aligned.
        data: the pages, in the order of the ranges; a view of the receiver's buffer.
    """

    target: str
    ranges: list[PageRange]
    data: memoryview


@dataclass
class Totals:
    """What a stream has carried so far; both sides count, and END compares.

    Attributes:
        frames: number of frames before END.
        data: bytes of page contents.
    """

    frames: int = 0
    data: int = 0

    def add(self, data: int) -> None:
        """Count one PAGES frame with so many bytes of data."""
        self.frames += 1
        self.data += data


def seal(frame: memoryview, header: Header) -> None:
    """Write the header into the first HEADER_SIZE bytes of a frame, checksum included.

    Args:
        frame: exactly one frame, ranges and data already in place.
        header: its `checksum` is ignored.
    """
    _HEADER.pack_into(
        frame,
        0,
        0,
        header.kind,
        header.nr_ranges,
        header.target,
        header.sequence,
        header.data_size,
        0,
    )
    _CHECKSUM.pack_into(frame, 0, xxhash.xxh3_64_intdigest(frame[CHECKSUM_SIZE:]))


def pack_ranges(ranges: Iterable[PageRange]) -> bytes:
    """The records of a frame's ranges."""
    return b"".join(_RANGE.pack(item.vaddr, item.nr_pages) for item in ranges)


def pack_end(totals: Totals, sequence: int) -> bytes:
    """A whole END frame."""
    frame = bytearray(HEADER_SIZE + TOTALS_SIZE)
    _TOTALS.pack_into(frame, HEADER_SIZE, totals.frames, totals.data)
    seal(memoryview(frame), Header(Kind.END, 0, TOTALS_SIZE, 0, sequence, 0))
    return bytes(frame)


class FrameChecker:
    """The receiving side of one stream: takes headers and bodies in turn, refuses all else.

    Attributes:
        totals: what has been accepted.
        offset: bytes of the stream accepted, for messages.
        finished: END has come, and the totals agree.
    """

    def __init__(self) -> None:
        self.totals = Totals()
        self.offset = 0
        self.finished = False
        self._sequence = 0

    def header(self, raw: bytes | bytearray) -> Header:
        """Check HEADER_SIZE bytes; afterwards `body_size` bytes are safe to read.

        Raises:
            PeerError: any field out of bounds or out of order.
        """
        checksum, kind, nr_ranges, target, sequence, data_size, reserved = _HEADER.unpack(raw)
        if self.finished:
            raise self.error("data after the end")
        if kind not in tuple(Kind):
            raise self.error(f"unknown kind of frame {kind}")
        if sequence != self._sequence:
            raise self.error(f"frame {sequence} comes where {self._sequence} is due")
        if nr_ranges > MAX_RANGES:
            raise self.error(f"{nr_ranges} ranges (limit {MAX_RANGES})")
        if data_size > MAX_DATA:
            raise self.error(f"{data_size} bytes of data (limit {MAX_DATA})")
        if reserved:
            raise self.error("reserved bytes are not zero")
        if kind == Kind.END and (nr_ranges, data_size, target) != (0, TOTALS_SIZE, 0):
            raise self.error("malformed end")
        if kind == Kind.PAGES and not nr_ranges:
            raise self.error("pages without a range")
        return Header(Kind(kind), nr_ranges, data_size, target, sequence, checksum)

    def body(self, header: Header, frame: memoryview) -> PageFrame | None:
        """Check a whole frame (header included) whose header was taken before.

        Returns:
            The pages, or None for END.

        Raises:
            PeerError: the checksum, the ranges or the totals are wrong.
        """
        if xxhash.xxh3_64_intdigest(frame[CHECKSUM_SIZE:]) != header.checksum:
            raise self.error("wrong checksum")
        ranges_end = HEADER_SIZE + header.ranges_size
        data = frame[ranges_end:]
        if header.kind is Kind.END:
            expected = Totals(*_TOTALS.unpack(data))
            if expected != self.totals:
                raise self.error(f"{expected} were sent, {self.totals} have come")
            self.finished = True
            result = None
        else:
            ranges = self._ranges(frame[HEADER_SIZE:ranges_end], header.data_size)
            result = PageFrame(self._target(header.target), ranges, data)
            self.totals.add(header.data_size)
        self._sequence += 1
        self.offset += len(frame)
        return result

    def error(self, reason: str) -> PeerError:
        """An error that says where in the stream it is."""
        return PeerError(f"page stream: {reason} (frame {self._sequence}, offset {self.offset})")

    def _target(self, target: int) -> str:
        try:
            return decode_target(target)
        except ValueError:
            raise self.error(f"unknown target {target:#x}") from None

    def _ranges(self, raw: memoryview, data_size: int) -> list[PageRange]:
        ranges = [PageRange(vaddr, pages) for vaddr, pages in _RANGE.iter_unpack(raw)]
        total = 0
        for vaddr, nr_pages in _RANGE.iter_unpack(raw):
            if vaddr % PAGE_SIZE or not 0 < nr_pages <= MAX_RANGES or vaddr >= 1 << 63:
                raise self.error(f"bad range {vaddr:#x} with {nr_pages} pages")
            total += nr_pages
        if total * PAGE_SIZE != data_size:
            raise self.error(f"{total} pages announced, {data_size} bytes of data")
        return ranges
