"""What waits unread in a pseudo terminal: input for its slaves, output for its master.

Nothing can look into these queues without emptying them. So the dump takes everything out and puts it back at once,
while the tree is stopped, and the restore puts it in by the same way: with settings under which the terminal changes
and echoes nothing. The work is done by the line discipline, later than the write that caused it: see `_wait`.

Source: termios(3), drivers/tty/n_tty.c, drivers/tty/pty.c.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import select
import struct
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

TIOCGPTPEER: Final = 0x5441
TIOCGLCKTRMIOS: Final = 0x5456
TIOCSLCKTRMIOS: Final = 0x5457
TERMIOS: Final = struct.Struct("=4IB19s")  # struct termios of asm-generic/termbits.h

# Bytes that surely find room again: the line discipline holds 4095, and what is beyond cannot be counted.
MOST: Final = 4000
_READ: Final = 4096
_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Queues:
    """The content of a terminal.

    Attributes:
        lines: complete lines of input, as the reads of a slave return them; without ICANON at most one piece.
        rest: an unfinished line.
        output: for the master.
    """

    lines: tuple[bytes, ...] = ()
    rest: bytes = b""
    output: bytes = b""

    @property
    def input(self) -> bytes:
        """What an image holds of the input: where a line ended by an end of file is not kept."""
        return b"".join(self.lines) + self.rest


def from_image(data: bytes, output: bytes, *, canonical: bool) -> Queues:
    """The opposite of `Queues.input`."""
    if not canonical:
        return Queues((data,) if data else (), b"", output)
    *lines, rest = data.split(b"\n")
    return Queues(tuple(line + b"\n" for line in lines), rest, output)


def unread(fd: int) -> int:
    """How much waits at this end, unfinished lines left out."""
    size = array.array("i", [0])
    fcntl.ioctl(fd, termios.TIOCINQ, size)
    return size[0]


def takes_output(slave: int) -> bool:
    """Whether a slave can write, that is, unless output is stopped (^S)."""
    poll = select.poll()
    poll.register(slave, select.POLLOUT)
    return bool(poll.poll(0))


class _Access:
    """A slave's description of our own, and settings under which bytes pass as they are; all is put back at the end.

    The others keep the flags of their descriptions.
    """

    def __init__(self, master: int) -> None:
        self.master = master
        self.saved = TERMIOS.unpack(fcntl.ioctl(master, termios.TCGETS, bytes(TERMIOS.size)))
        self.locked = fcntl.ioctl(master, TIOCGLCKTRMIOS, bytes(TERMIOS.size))
        self.canonical = bool(self.saved[3] & termios.ICANON)
        self.slave: int = fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)

    def __enter__(self) -> _Access:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            fcntl.ioctl(self.master, termios.TCSETS, TERMIOS.pack(*self.saved))
            fcntl.ioctl(self.master, TIOCSLCKTRMIOS, self.locked)
        finally:
            os.close(self.slave)

    def plain(self, *, canonical: bool, end: int = 0) -> None:
        """Let everything pass. `end`: the character that ends a line without being part of it.

        IXON stays, lest a master in packet mode be told: what it takes out is not in the input any more.
        """
        iflag, _, cflag, _, line, old = self.saved
        cc = bytearray(len(old))
        for name in (termios.VSTART, termios.VSTOP):
            cc[name] = old[name]
        cc[termios.VEOF], cc[termios.VMIN] = end, 1
        fcntl.ioctl(self.master, TIOCSLCKTRMIOS, bytes(TERMIOS.size))
        lflag = termios.ICANON if canonical else 0
        fcntl.ioctl(self.master, termios.TCSETS, TERMIOS.pack(iflag & termios.IXON, 0, cflag, lflag, line, bytes(cc)))

    def reads(self) -> Iterator[bytes]:
        """What a slave can read: a line a time."""
        while True:
            try:
                yield os.read(self.slave, _READ)
            except BlockingIOError:
                return

    def output(self) -> bytes:
        """Everything that the master can read."""
        found = b""
        poll = select.poll()
        poll.register(self.master, select.POLLIN)
        # poll(2) makes the line discipline finish its work.
        while poll.poll(0) and (size := unread(self.master)):
            found += os.read(self.master, size)
        return found

    def put(self, queues: Queues) -> None:
        # With a character that is nowhere in it. Switching to ICANON only while nothing waits: it would be one line.
        end = next(value for value in range(1, 256) if value not in queues.input)
        self.plain(canonical=self.canonical, end=end)
        _write(self.slave, queues.output)
        if self.canonical:
            ended = (line if line.endswith(b"\n") else line + bytes([end]) for line in queues.lines)
            _write(self.master, b"".join(ended) + queues.rest)
        else:
            _write(self.master, queues.input)
        self._wait(sum(map(len, queues.lines)))

    def _wait(self, size: int) -> None:
        """Until the input has arrived: before that the old settings must not come back.

        TIOCINQ waits for the piece of work that it interrupts, which brings the unfinished line too.
        """
        deadline = time.monotonic() + _SECONDS
        poll = select.poll()
        poll.register(self.slave, select.POLLIN)
        poll.poll(0)
        while unread(self.slave) < size:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "unread input does not fit into the terminal")
            time.sleep(0.0005)


def _write(fd: int, data: bytes) -> None:
    """Write all of it; the line discipline makes room as it works. The master may block: it has room for `MOST`."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while data:
        if not poll.poll(_SECONDS * 1000):
            raise TimeoutError(errno.ETIMEDOUT, "unread output does not fit into the terminal")
        data = data[os.write(fd, data) :]


def take(master: int) -> Queues:
    """Read everything and put it back. The owners of both ends are stopped, and a slave is open.

    Input and output are `MOST` at most, and a slave `takes_output`.

    Raises:
        OSError: among others, the terminal is locked (EIO).
    """
    with _Access(master) as access:
        output = access.output()
        lines = tuple(access.reads()) if access.canonical else ()
        access.plain(canonical=False)
        rest = b"".join(access.reads())
        found = Queues(lines, rest, output) if access.canonical else Queues((rest,) if rest else (), b"", output)
        if lines or rest or output:
            access.put(found)
    return found


def put(master: int, queues: Queues) -> None:
    """Fill the queues of a terminal that has its final settings; a slave is open.

    Raises:
        OSError: among others, they do not fit.
    """
    with _Access(master) as access:
        access.put(queues)
