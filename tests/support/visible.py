"""What can be seen of a process in /proc, for a comparison before and after a move.

    before = visible_tree(target.outer_pid)
    ...
    assert not difference(before, visible_tree(target.outer_pid))

PIDs and TIDs in a state are those of the process's own pid namespace. Identities that the kernel
makes up anew (inode numbers of pipes and sockets, mount ids, device numbers) are left out or
numbered in the order in which they are met. Counters and times are left out; what a working
program changes by itself (file positions, its pending signals) is not: name it in `ignore`, or
stop the program before looking.

Source: proc_pid_status(5), proc_pid_stat(5), proc_pid_fdinfo(5), proc_pid_timers(5) and others.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

State = dict[str, object]

_PROCESS_KEYS = ("Umask", "NSpgid", "NSsid", "ShdPnd", "SigIgn", "SigCgt", "CoreDumping", "THP_enabled")
_THREAD_KEYS = (
    *("Name", "Uid", "Gid", "Groups", "SigPnd", "SigBlk", "NoNewPrivs", "Seccomp", "Seccomp_filters"),
    *("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "Cpus_allowed_list"),
)
# Numbers of fields of /proc/PID/stat, counted from 1.
_MM_FIELDS = {
    "start_code": 26,
    "end_code": 27,
    "start_stack": 28,
    "start_data": 45,
    "end_data": 46,
    "start_brk": 47,
    "arg_start": 48,
    "arg_end": 49,
    "env_start": 50,
    "env_end": 51,
}
_SCHEDULER_FIELDS = {"nice": 19, "rt_priority": 40, "policy": 41}
_FDINFO_LEFT_OUT = ("mnt_id", "ino", "eventfd-id")


def visible_state(pid: int) -> State:
    """The state of one process.

    Args:
        pid: as the caller sees it.

    Returns:
        Nested dictionaries: `fds` by number (link, pos, flags and what else fdinfo tells), `maps`
        (neighbours merged), `threads` by TID (names, ids, capabilities, masks, scheduling), `mm`,
        `limits`, `timers`, `ppid`, links, and /proc files as text or hex.

    Raises:
        FileNotFoundError, ProcessLookupError: it is not there, or ends meanwhile.
    """
    return _state(Path("/proc", str(pid)), _Names())


def visible_tree(pid: int) -> State:
    """The states of a process and all its descendants, by PID; without the parent of the first.

    Pipes and sockets have one numbering in the whole tree, so that sharing between processes
    shows. Zombies appear as such.
    """
    names = _Names()
    states: dict[int, object] = {}
    for outer in sorted(_descendants(pid), key=lambda outer: _inner(Path("/proc", str(outer)))):
        proc = Path("/proc", str(outer))
        if _status(proc)["State"].startswith("Z"):
            states[_inner(proc)] = "zombie"
            continue
        state = _state(proc, names)
        if outer == pid:
            del state["ppid"]
        states[_inner(proc)] = state
    return {str(inner): state for inner, state in states.items()}


def difference(before: object, after: object, ignore: Sequence[str] = ()) -> list[str]:
    """What differs, a line each, as in `1000.fds.3.flags: '02' became '02000'`.

    Args:
        before, after: two states, or two trees.
        ignore: patterns (fnmatch) of paths to leave out, as in `*.fds.*.pos`.
    """
    return [
        f"{path}: {text}"
        for path, text in _differences(before, after, "")
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in ignore)
    ]


def _differences(before: object, after: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            below = f"{path}.{key}" if path else str(key)
            if key not in after:
                yield below, f"gone; was {before[key]!r}"
            elif key not in before:
                yield below, f"new: {after[key]!r}"
            else:
                yield from _differences(before[key], after[key], below)
    elif isinstance(before, list) and isinstance(after, list):
        yield from ((path, f"gone: {item}") for item in before if item not in after)
        yield from ((path, f"new: {item}") for item in after if item not in before)
    elif before != after:
        yield path, f"{before!r} became {after!r}"


class _Names:
    """Gives `pipe:[81234]` a number of its own kind: 1 for the first pipe that is met, 2 ..."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def __call__(self, link: str) -> str:
        match = re.fullmatch(r"(\w+):\[\d+\]", link)
        if not match:
            return link
        number = 1 + sum(name.startswith(f"{match[1]}:") for name in self._known.values())
        return self._known.setdefault(link, f"{match[1]}:{number}")


def _state(proc: Path, names: _Names) -> State:
    status = _status(proc)
    stat = _stat(proc)
    threads = sorted(proc.joinpath("task").iterdir(), key=_inner)
    inner_tids = {int(thread.name): _inner(thread) for thread in threads}
    return {
        "ppid": _inner_parent(proc, int(status["PPid"])),
        **{key: status[key].split()[-1] for key in _PROCESS_KEYS if key in status},
        "threads": {str(_inner(thread)): _thread(thread) for thread in threads},
        "fds": _fds(proc, names),
        "maps": _merged_maps(proc),
        "mm": {name: hex(int(stat[number])) for name, number in _MM_FIELDS.items()},
        "limits": dict(_limits(proc)),
        "timers": _timers(proc, inner_tids),
        **{link: os.readlink(proc / link) for link in ("cwd", "root", "exe")},
        **{name: _text(proc / name) for name in ("oom_score_adj", "personality", "coredump_filter", "timerslack_ns")},
        **{name: proc.joinpath(name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ")},
        "auxv": proc.joinpath("auxv").read_bytes().hex(),
    }


def _thread(task: Path) -> State:
    status, stat = _status(task), _stat(task)
    return {
        **{key: " ".join(status[key].split()) for key in _THREAD_KEYS if key in status},
        **{name: int(stat[number]) for name, number in _SCHEDULER_FIELDS.items()},
    }


def _fds(proc: Path, names: _Names) -> dict[str, State]:
    fds = {}
    for number in sorted(int(entry.name) for entry in proc.joinpath("fd").iterdir()):
        try:
            link = os.readlink(proc / "fd" / str(number))
            text = proc.joinpath("fdinfo", str(number)).read_text()
        except FileNotFoundError:
            continue  # closed while we looked
        info: State = {"link": names(link)}
        watches: list[str] = []
        for line in text.splitlines():
            key, _colon, value = line.partition(":")
            if key == "tfd":  # of an epoll: fd, events and data, then the file's identity
                watches.append(" ".join(line.split()).partition(" pos:")[0])
            elif key not in _FDINFO_LEFT_OUT:
                info[key] = value.strip()
        if watches:
            info["watches"] = sorted(watches)
        fds[str(number)] = info
    return fds


def _merged_maps(proc: Path) -> list[str]:
    # Where one mapping ends and the next begins is no property of the memory: the kernel merges
    # neighbours when it can, at times of its own.
    merged: list[tuple[int, int, str, int, str]] = []
    for line in proc.joinpath("maps").read_text().splitlines():
        area, permissions, offset_text, _device, _inode, *rest = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in area.split("-"))
        offset, path = int(offset_text, 16), rest[0] if rest else ""
        if merged:
            first, last, of_last, offset_of_last, path_of_last = merged[-1]
            adjacent = last == start and of_last == permissions and path_of_last == path
            if adjacent and (not path.startswith("/") or offset == offset_of_last + last - first):
                merged[-1] = (first, end, permissions, offset_of_last, path)
                continue
        merged.append((start, end, permissions, offset, path))
    return [f"{start:x}-{end:x} {mode} {offset:x} {path}".rstrip() for start, end, mode, offset, path in merged]


def _limits(proc: Path) -> Iterator[tuple[str, str]]:
    for line in proc.joinpath("limits").read_text().splitlines()[1:]:
        yield line[:25].strip(), " ".join(line[25:].split()[:2])


def _timers(proc: Path, inner_tids: dict[int, int]) -> dict[str, State]:
    timers: dict[str, State] = {}
    for line in proc.joinpath("timers").read_text().splitlines():
        key, _colon, value = (part.strip() for part in line.partition(":"))
        if key == "ID":
            current = timers.setdefault(value, {})
            continue
        if key == "notify":  # "signal/tid.1234": a TID as the reader of /proc sees it
            value = re.sub(r"\d+$", lambda match: str(inner_tids.get(int(match[0]), 0)), value)
        current[key] = value
    return timers


def _descendants(pid: int) -> Iterator[int]:
    yield pid
    for task in Path("/proc", str(pid), "task").iterdir():
        for child in task.joinpath("children").read_text().split():
            yield from _descendants(int(child))


def _status(proc: Path) -> dict[str, str]:
    lines = proc.joinpath("status").read_text().splitlines()
    return {key: value.strip() for key, _colon, value in (line.partition(":") for line in lines)}


def _stat(proc: Path) -> list[str]:
    # Counted from 1; the name, which may hold blanks and parentheses, is left empty.
    before, _name, after = proc.joinpath("stat").read_text().partition("(")
    return ["", before.strip(), "", *after.rpartition(")")[2].split()]


def _inner(proc: Path) -> int:
    return int(_status(proc)["NSpid"].split()[-1])


def _inner_parent(proc: Path, parent: int) -> int:
    # A parent in another pid namespace is 0, as getppid(2) says.
    if parent == 0 or os.readlink(proc / "ns/pid") != os.readlink(f"/proc/{parent}/ns/pid"):
        return 0
    return _inner(Path("/proc", str(parent)))


def _text(path: Path) -> str:
    return path.read_text().strip()
