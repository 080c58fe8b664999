"""Files that a tree needs on the other host: named before the freeze, checked there, and again at the restore.

A program or library must be the same build: its pages that were never written to are not sent but mapped.
Source: elf(5), PT_NOTE with NT_GNU_BUILD_ID.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from phaul.engine.proc import Mapping, Proc
from phaul.engine.vmas import is_memfd
from phaul.errors import NoSuchProcess

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_PT_NOTE = 4
_NT_GNU_BUILD_ID = 3
_MAX_NOTES = 1 << 16


@dataclass(frozen=True, slots=True)
class NeededFile:
    """A file that must be there.

    Attributes:
        path: absolute.
        size: bytes that it must have, or -1 if that does not matter yet (an open file may grow).
        build_id: GNU build id, empty if it has none.
    """

    path: bytes
    size: int = -1
    build_id: bytes = b""


def build_id(path: bytes) -> bytes:
    """The GNU build id of an ELF file; empty if it is not one, or has none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b""
        head = os.pread(fd, _HEADER.size, 0)
        if len(head) < _HEADER.size or head[:5] != b"\x7fELF\x02":
            return b""
        fields = _HEADER.unpack(head)
        offset, entry_size, number = fields[5], fields[9], fields[10]
        if entry_size != _SEGMENT.size:
            return b""
        table = os.pread(fd, entry_size * number, offset)
        for i in range(len(table) // _SEGMENT.size):
            kind, _, start, _, _, size, _, _ = _SEGMENT.unpack_from(table, i * _SEGMENT.size)
            if kind == _PT_NOTE and (found := _find_note(os.pread(fd, min(size, _MAX_NOTES), start))):
                return found
        return b""
    finally:
        os.close(fd)


def _find_note(notes: bytes) -> bytes:
    position = 0
    while position + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, position)
        name = notes[position + 12 : position + 12 + name_size]
        start = position + 12 + (name_size + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and name == b"GNU\0":
            return notes[start : start + size]
        position = start + (size + 3 & ~3)
    return b""


def words(identity: bytes) -> list[int]:
    """A build id as reg_file_entry has it: four bytes a word, the first byte highest."""
    return [int.from_bytes(identity[i : i + 4].ljust(4, b"\0"), "big") for i in range(0, len(identity), 4)]


def needed_by(pid: int, maps: Iterable[Mapping]) -> list[NeededFile]:
    """Files that a process maps or has open by path, and its program and working directory."""
    found: dict[bytes, NeededFile] = {}
    for mapping in maps:
        if mapping.inode and mapping.path.startswith(b"/") and not mapping.deleted and not is_memfd(mapping):
            path = mapping.path
            if path not in found and os.path.isfile(path):
                found[path] = NeededFile(path, os.stat(path).st_size, build_id(path))
    proc = Proc(pid)
    for name in ["cwd", *(f"fd/{fd}" for fd in proc.fds())]:
        try:
            link = proc.link(name)
        except NoSuchProcess:
            continue  # closed meanwhile
        if link.startswith(b"/") and os.path.exists(link) and not _is_pseudo_terminal(link):
            found.setdefault(link, NeededFile(link))
    return list(found.values())


def _is_pseudo_terminal(path: bytes) -> bool:
    """Whether a node appears by itself when the terminal is made (UNIX98_PTY_SLAVE_MAJOR)."""
    status = os.stat(path)
    return stat.S_ISCHR(status.st_mode) and os.major(status.st_rdev) == 136


def check_files(files: Iterable[NeededFile]) -> list[str]:
    """What of `files` is missing here, or is another build; a line each."""
    problems = []
    for file in files:
        name = os.fsdecode(file.path)
        try:
            here = os.stat(file.path)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        if file.build_id:
            if build_id(file.path) != file.build_id:
                problems.append(f"{name}: another build (build id {file.build_id.hex()} is needed)")
        elif file.size >= 0 and here.st_size != file.size:
            problems.append(f"{name}: another file ({here.st_size} bytes, {file.size} are needed)")
    return problems
