"""Page maps: built, read back, checked."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from phaul.errors import ImageError
from phaul.images import codec, pagemap
from phaul.images.pagemap import PAGE_SIZE, PageEntry, PageFlags, PageMap, PageRange, split
from phaul.images.pb.pagemap_pb2 import pagemap_entry, pagemap_head

LAZY, PARENT, PRESENT = PageFlags.LAZY, PageFlags.PARENT, PageFlags.PRESENT


@st.composite
def page_entries(draw: st.DrawFn) -> list[PageEntry]:
    """Entries in order; gaps (0: next to each other), lengths and flags are random."""
    entries, page = [], 0
    for _ in range(draw(st.integers(0, 8))):
        page += draw(st.integers(0, 2**34))
        count = draw(st.integers(1, 2**20) | st.integers(2**32 - 2, 2**32 + 2))
        flags = draw(st.sampled_from([PARENT, PRESENT, LAZY, LAZY | PRESENT]))
        entries.append(PageEntry(PageRange(page * PAGE_SIZE, count), flags))
        page += count
    return entries


@given(page_entries(), st.integers(0, 2**32 - 1))
def test_a_page_map_survives(entries: list[PageEntry], pages_id: int) -> None:
    messages = pagemap.build_pagemap(pages_id, entries)
    image = codec.encode("pagemap-1", [(message, b"") for message in messages])
    read = [message for message, _ in codec.decode("pagemap-1", image)]
    assert pagemap.parse_pagemap("pagemap-1", read) == PageMap(pages_id, tuple(entries))


@given(page_entries())
def test_offsets_follow_each_other_over_the_present_pages(entries: list[PageEntry]) -> None:
    places = list(pagemap.iter_offsets(entries))
    assert [pages for pages, _ in places] == [e.range for e in entries if PRESENT in e.flags]
    end = 0
    for pages, offset in places:
        assert offset == end
        end += pages.size
    page_map = PageMap(1, tuple(entries))
    assert page_map.pages_size == end
    page_map.check_pages_size(end)
    for wrong in (end - 1, end + 1, end + PAGE_SIZE):
        with pytest.raises(ImageError, match=rf"pages-1.img has {wrong} bytes, .* needs {end}"):
            page_map.check_pages_size(wrong)


def test_the_file_of_an_example() -> None:
    entries = [
        PageEntry(PageRange(0x1000, 2)),
        PageEntry(PageRange(0x3000, 1), PARENT),
        PageEntry(PageRange(0x9000, 3), PRESENT | LAZY),
    ]
    assert list(pagemap.iter_offsets(entries)) == [
        (PageRange(0x1000, 2), 0),
        (PageRange(0x9000, 3), 0x2000),
    ]
    assert PageRange(0x1000, 2).end == 0x3000


def test_old_and_new_criu_both_find_the_number_of_pages() -> None:
    small, big = PageRange(0, 2**32 - 1), PageRange(2**32 * PAGE_SIZE, 2**32)
    messages = pagemap.build_pagemap(7, [PageEntry(small), PageEntry(big)])
    assert messages == [
        pagemap_head(pages_id=7),
        pagemap_entry(vaddr=0, compat_nr_pages=2**32 - 1, flags=4, nr_pages=2**32 - 1),
        pagemap_entry(vaddr=2**44, compat_nr_pages=0, flags=4, nr_pages=2**32),
    ]


@pytest.mark.parametrize(
    ("fields", "count", "flags"),
    [
        ({"compat_nr_pages": 5}, 5, PRESENT),
        ({"compat_nr_pages": 5, "in_parent": False}, 5, PRESENT),
        ({"compat_nr_pages": 5, "in_parent": True}, 5, PARENT),
        ({"compat_nr_pages": 5, "in_parent": True, "flags": 1}, 5, PARENT),
        ({"compat_nr_pages": 5, "flags": 6}, 5, PRESENT | LAZY),
        ({"compat_nr_pages": 0, "flags": 4, "nr_pages": 5}, 5, PRESENT),
        ({"compat_nr_pages": 4, "flags": 4, "nr_pages": 5}, 5, PRESENT),
    ],
)
def test_entries_of_all_ages_of_criu(fields: Any, count: int, flags: PageFlags) -> None:
    messages = [pagemap_head(pages_id=1), pagemap_entry(vaddr=0x1000, **fields)]
    (entry,) = pagemap.parse_pagemap("pagemap-1", messages).entries
    assert entry == PageEntry(PageRange(0x1000, count), flags)


def entry(vaddr: int, count: int, **fields: Any) -> pagemap_entry:
    return pagemap_entry(vaddr=vaddr, compat_nr_pages=0, nr_pages=count, **fields)


HEAD = pagemap_head(pages_id=1)


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "does not begin with a pagemap_head"),
        ([entry(0, 1)], "does not begin with a pagemap_head"),
        ([HEAD, HEAD], "has a pagemap_head among its entries"),
        ([HEAD, entry(0x1001, 1)], "0x1001 is not page aligned"),
        ([HEAD, entry(0x1000, 0)], "no pages at 0x1000"),
        ([HEAD, entry(0x1000, 2), entry(0x2000, 1)], "0x2000 lies before the end"),
        ([HEAD, entry(0x2000, 1), entry(0x1000, 1)], "0x1000 lies before the end"),
        ([HEAD, entry(0x1000, 1), entry(0x1000, 1)], "0x1000 lies before the end"),
        ([HEAD, entry(0x1000, 2**64 - 1)], "reach beyond user space"),
        ([HEAD, entry(2**64 - PAGE_SIZE, 1)], "reach beyond user space"),
        ([HEAD, entry(pagemap.USER_END, 1)], "reach beyond user space"),
        ([HEAD, entry(0x1000, 1, flags=8)], "unknown flags 0x8 at 0x1000"),
        ([HEAD, entry(0x1000, 1, flags=0)], "0x1000 is nowhere"),
        ([HEAD, entry(0x1000, 1, flags=5)], "0x1000 is in the parent and also here"),
        ([HEAD, entry(0x1000, 1, flags=3)], "0x1000 is in the parent and also here"),
        ([HEAD, entry(0x1000, 1, flags=4, in_parent=True)], "in the parent and also here"),
    ],
)
def test_what_is_no_page_map_is_refused(messages: list[Message], what: str) -> None:
    with pytest.raises(ImageError, match=f"^pagemap-1.*{what}"):
        pagemap.parse_pagemap("pagemap-1", messages)


def test_the_last_page_of_user_space_is_one() -> None:
    last = entry(pagemap.USER_END - PAGE_SIZE, 1)
    (parsed,) = pagemap.parse_pagemap("pagemap-1", [HEAD, last]).entries
    assert parsed.range.end == pagemap.USER_END


def test_what_would_be_refused_is_not_built() -> None:
    overlapping = [PageEntry(PageRange(0x1000, 2)), PageEntry(PageRange(0x2000, 1))]
    with pytest.raises(ImageError, match=r"page map of pages-3\.img: 0x2000 lies before"):
        pagemap.build_pagemap(3, overlapping)


big_ranges = st.lists(
    st.builds(
        lambda page, count: PageRange(page * PAGE_SIZE, count), st.integers(0, (1 << 35) - 1), st.integers(1, 5000)
    ),
    max_size=30,
)


@given(big_ranges, st.sampled_from([1, 3, 256, 1024]))
def test_split_keeps_every_page_in_order(ranges: list[PageRange], pages: int) -> None:
    chunks = list(split(ranges, pages * PAGE_SIZE, most=100))
    for chunk in chunks:
        assert 1 <= len(chunk) <= 100
        assert sum(item.size for item in chunk) <= pages * PAGE_SIZE
    for chunk in chunks[:-1]:
        assert len(chunk) == 100 or sum(item.nr_pages for item in chunk) == pages
    flat = [(item.vaddr + index * PAGE_SIZE) for chunk in chunks for item in chunk for index in range(item.nr_pages)]
    assert flat == [item.vaddr + index * PAGE_SIZE for item in ranges for index in range(item.nr_pages)]


def test_split_never_exceeds_the_number_of_ranges() -> None:
    ranges = [PageRange(index * 2 * PAGE_SIZE, 1) for index in range(2500)]
    assert [len(chunk) for chunk in split(ranges, 4 << 20)] == [1024, 1024, 452]
