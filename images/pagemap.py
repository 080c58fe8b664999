"""Page maps: which pages an image set has, and where in `pages-N.img` each of them lies.

A page map is one `pagemap_head` (the N of the pages file) and then entries in ascending order
of address. The pages file is the present pages, one after the other, in that order: no index.
For shared memory (`pagemap-shmem-ID`) an address is an offset in the object.

Source: CRIU 4.2, `images/pagemap.proto`, `criu/pagemap.c`, `criu/page-xfer.c`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from google.protobuf.message import Message

from phaul.errors import ImageError
from phaul.images.pb.pagemap_pb2 import pagemap_entry, pagemap_head

PAGE_SIZE = 4096

# TASK_SIZE_MAX of x86-64 with five-level page tables.
USER_END = (1 << 56) - PAGE_SIZE

_U32_END = 1 << 32


class PageFlags(enum.IntFlag):
    """Where the pages of an entry are. Not to be combined, but for LAZY with PRESENT."""

    PARENT = 1
    """Unchanged since the parent image set, which has them."""
    LAZY = 2
    """May be fetched when the restored tree first touches them."""
    PRESENT = 4
    """In the pages file of this image set."""


@dataclass(frozen=True, slots=True, order=True)
class PageRange:
    """Some pages in a row.

    Attributes:
        vaddr: address of the first, in bytes; a multiple of `PAGE_SIZE`.
        nr_pages: how many, at least one.
    """

    vaddr: int
    nr_pages: int

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.nr_pages * PAGE_SIZE

    @property
    def end(self) -> int:
        """Address of the first byte behind the last page."""
        return self.vaddr + self.size


@dataclass(frozen=True, slots=True)
class PageEntry:
    """A range and where its pages are."""

    range: PageRange
    flags: PageFlags = PageFlags.PRESENT


@dataclass(frozen=True, slots=True)
class PageMap:
    """A checked page map.

    Attributes:
        pages_id: the N of `pages-N.img`.
        entries: in ascending order, none overlapping another.
    """

    pages_id: int
    entries: tuple[PageEntry, ...]

    @property
    def pages_size(self) -> int:
        """Bytes that the pages file must have."""
        return sum(entry.range.size for entry in self.entries if _is_present(entry))

    def check_pages_size(self, size: int) -> None:
        """Compares the length of the pages file with what the entries need.

        Raises:
            ImageError: it is shorter or longer than that.
        """
        if size != self.pages_size:
            raise ImageError(f"pages-{self.pages_id}.img has {size} bytes, its page map needs {self.pages_size}")


def build_pagemap(pages_id: int, entries: Iterable[PageEntry]) -> list[Message]:
    """Returns the messages of a page map: the head, then an entry for each of `entries`.

    CRIU before 4.2 knows only `compat_nr_pages`, which has 32 bits; 4.2 reads `nr_pages`. Both
    are written where the number fits, so that either can read the image.

    Raises:
        ImageError: the entries are not a page map, as `parse_pagemap` would say.
    """
    messages: list[Message] = [pagemap_head(pages_id=pages_id)]
    position = 0
    for entry in entries:
        _check(f"page map of pages-{pages_id}.img", entry, position)
        position, count = entry.range.end, entry.range.nr_pages
        messages.append(
            pagemap_entry(
                vaddr=entry.range.vaddr,
                compat_nr_pages=count if count < _U32_END else 0,
                flags=int(entry.flags),
                nr_pages=count,
            )
        )
    return messages


def parse_pagemap(name: str, messages: Iterable[Message]) -> PageMap:
    """Checks the messages of the image `name` and returns the page map.

    Raises:
        ImageError: it does not begin with a head, or an entry is not page aligned, empty, out
            of order, overlapping, beyond user space, or has flags that make no sense.
    """
    rest = iter(messages)
    head = next(rest, None)
    if not isinstance(head, pagemap_head):
        raise ImageError(f"{name} does not begin with a pagemap_head")
    entries: list[PageEntry] = []
    position = 0
    for message in rest:
        if not isinstance(message, pagemap_entry):
            raise ImageError(f"{name} has a {message.DESCRIPTOR.name} among its entries")
        # Since 4.2 nr_pages counts when it is there, whatever the other one says.
        count = message.nr_pages if message.HasField("nr_pages") else message.compat_nr_pages
        entry = PageEntry(PageRange(message.vaddr, count), _flags_of(name, message))
        _check(name, entry, position)
        position = entry.range.end
        entries.append(entry)
    return PageMap(head.pages_id, tuple(entries))


def iter_offsets(entries: Iterable[PageEntry]) -> Iterator[tuple[PageRange, int]]:
    """Yields each present range with its offset in the pages file, in bytes."""
    offset = 0
    for entry in entries:
        if _is_present(entry):
            yield entry.range, offset
            offset += entry.range.size


def _is_present(entry: PageEntry) -> bool:
    return bool(entry.flags & PageFlags.PRESENT)


def _flags_of(name: str, message: pagemap_entry) -> PageFlags:
    # Before flags there was in_parent, and no mark at all meant present.
    value = message.flags
    if message.in_parent:
        value |= PageFlags.PARENT
    elif not message.HasField("flags"):
        value = PageFlags.PRESENT
    if value >= 2 * PageFlags.PRESENT:
        raise ImageError(f"{name}: unknown flags {value:#x} at {message.vaddr:#x}")
    return PageFlags(value)


def _check(name: str, entry: PageEntry, position: int) -> None:
    pages = entry.range
    if pages.vaddr % PAGE_SIZE:
        raise ImageError(f"{name}: {pages.vaddr:#x} is not page aligned")
    if pages.nr_pages < 1:
        raise ImageError(f"{name}: no pages at {pages.vaddr:#x}")
    if pages.vaddr < position:
        raise ImageError(f"{name}: {pages.vaddr:#x} lies before the end of the entry before it")
    if pages.end > USER_END:
        raise ImageError(f"{name}: {pages.nr_pages} pages at {pages.vaddr:#x} reach beyond user space")
    if not entry.flags:
        raise ImageError(f"{name}: {pages.vaddr:#x} is nowhere")
    if PageFlags.PARENT in entry.flags and entry.flags != PageFlags.PARENT:
        raise ImageError(f"{name}: {pages.vaddr:#x} is in the parent and also here")


def split(ranges: Iterable[PageRange], limit: int, most: int = 1024) -> Iterator[list[PageRange]]:
    """Cuts ranges into lists that fit into a buffer.

    Args:
        limit: bytes of pages in a list, a multiple of `PAGE_SIZE`.
        most: ranges in a list (1024: IOV_MAX).

    Yields:
        Lists, not empty, with all pages in the order given.
    """
    chunk: list[PageRange] = []
    room = left = limit // PAGE_SIZE
    for item in ranges:
        vaddr, pages = item.vaddr, item.nr_pages
        while pages:
            take = min(pages, left)
            chunk.append(PageRange(vaddr, take))
            vaddr, pages, left = vaddr + take * PAGE_SIZE, pages - take, left - take
            if not left or len(chunk) == most:
                yield chunk
                chunk, left = [], room
    if chunk:
        yield chunk
