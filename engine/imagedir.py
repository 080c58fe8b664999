"""Image sets in directories, pages included: what `phaul dump` writes and `phaul restore` reads."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from phaul.engine.dump import Dump
from phaul.engine.restore import Restore, RestoreOptions
from phaul.errors import DumpError, ImageError
from phaul.images.imageset import begin_directory, read_directory, write_directory
from phaul.images.pagemap import PageFlags, parse_pagemap, split

CHUNK = 4 << 20


def dump_to_directory(dump: Dump, path: Path) -> int:
    """Write a frozen, collected tree into an existing directory. Returns the bytes of page contents.

    Raises:
        DumpError: writing failed (full disk). No image set is left in the directory, nor any pages.
    """
    begin_directory(path)
    written: list[Path] = []
    total = 0
    buffer = memoryview(bytearray(CHUNK))
    try:
        for target in dump.page_targets():
            head = parse_pagemap(target, dump.images.messages(target))
            file = path / f"pages-{head.pages_id}.img"
            written.append(file)
            fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                for chunk in split(dump.pages_of(target), CHUNK):
                    view = buffer[: sum(item.size for item in chunk)]
                    dump.read_pages(target, chunk, view)
                    total += len(view)
                    while view:
                        view = view[os.write(fd, view) :]
            finally:
                os.close(fd)
        write_directory(dump.images, path)
    except BaseException as error:
        for file in written:
            with contextlib.suppress(OSError):
                file.unlink()
        if isinstance(error, OSError):
            raise DumpError(f"cannot write {written[-1]}: {error.strerror}") from error
        raise
    return total


def restore_from_directory(path: Path, options: RestoreOptions) -> Restore:
    """Rebuild a tree from a directory: staged, filled and finished, ready for `resume`.

    Raises:
        ImageError, RestoreError: nothing of the tree is left.
    """
    images = read_directory(path)
    restore = Restore(images, options)
    restore.stage()
    try:
        buffer = memoryview(bytearray(CHUNK))
        for name in images.names():
            if name.startswith("pagemap-"):
                _fill(restore, name, path, buffer)
        restore.finish()
    except BaseException:
        restore.abort()
        raise
    return restore


def _fill(restore: Restore, name: str, path: Path, buffer: memoryview) -> None:
    page_map = parse_pagemap(name, restore.images.messages(name))
    file = path / f"pages-{page_map.pages_id}.img"
    if any(entry.flags & PageFlags.PARENT for entry in page_map.entries):
        raise ImageError(f"{name}: pages are in a parent image set, which cannot be read yet")
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"cannot read {file}: {error.strerror}") from error
    try:
        page_map.check_pages_size(os.fstat(fd).st_size)
        for chunk in split((entry.range for entry in page_map.entries), CHUNK):
            view = buffer[: sum(item.size for item in chunk)]
            if os.readv(fd, [view]) != len(view):
                raise ImageError(f"{file} became shorter while it was read")
            restore.write_pages(name, chunk, view)
    finally:
        os.close(fd)
