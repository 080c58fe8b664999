"""Pseudo terminals: settings, ends, and what waits unread in them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import termios
import tty

import pytest

from phaul.engine.state.files.tty import TIOCGPTLCK, TIOCGPTN
from phaul.engine.state.files.tty_queues import Queues, from_image, unread
from phaul.errors import CannotMove, RestoreError
from tests.engine.files.holding import Holder

pytestmark = pytest.mark.root


def reads(fd: int) -> list[bytes]:
    """What single reads return, until nothing is left."""
    found = []
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while poll.poll(50):
        found.append(os.read(fd, 4096))
    return found


def number(master: int) -> int:
    """N of /dev/pts/N."""
    value: int = struct.unpack("i", fcntl.ioctl(master, TIOCGPTN, bytes(4)))[0]
    return value


def ends(holder: Holder, raw: bool = False) -> tuple[int, int, int, int]:
    """The numbers of both ends in the process, and ours."""
    master, slave = os.openpty()
    if raw:
        tty.setraw(slave)
    mine = os.dup(master), os.dup(slave)
    holder.give(master, slave)
    return master, slave, *mine


@pytest.mark.parametrize("raw", [False, True], ids=["lines", "raw"])
def test_unread_data_moves_and_stays(holder: Holder, raw: bool) -> None:
    """The source has it after the dump as before, with the same lines, and nothing is echoed again."""
    master, slave, our_master, our_slave = ends(holder, raw)
    os.write(our_master, b"one\ntwo\nand a ha")
    echoed = b"" if raw else b"one\r\ntwo\r\nand a ha"
    lines = [b"one\ntwo\nand a ha"] if raw else [b"one\n", b"two\n"]
    while unread(our_master) < len(echoed):
        pass  # echoes come by and by
    os.write(our_slave, b"out\n")
    before = termios.tcgetattr(our_slave)
    images, _ = holder.dump()

    assert termios.tcgetattr(our_slave) == before
    assert reads(our_slave) == lines
    assert b"".join(reads(our_master)) == echoed + (b"out\n" if raw else b"out\r\n")
    if not raw:
        os.write(our_master, b"lf\n")
        assert reads(our_slave) == [b"and a half\n"]
    for fd in (our_master, our_slave):
        os.close(fd)
    holder.stop()

    built = holder.build(images)
    copy_master, copy_slave = (built.fds[built.tables["fdinfo-1"][fd]] for fd in (master, slave))
    assert termios.tcgetattr(copy_slave) == before
    assert reads(copy_slave) == lines
    assert b"".join(reads(copy_master)) == echoed + (b"out\n" if raw else b"out\r\n")
    if not raw:
        os.write(copy_master, b"lf\n")
        assert reads(copy_slave) == [b"and a half\n"]


def test_much_output(holder: Holder) -> None:
    master, _slave, our_master, our_slave = ends(holder, raw=True)
    written = os.write(our_slave, bytes(range(250)) * 15)
    images, _ = holder.dump()
    waiting = b"".join(reads(our_master))
    assert len(waiting) == written == 3750
    for fd in (our_master, our_slave):
        os.close(fd)
    holder.stop()
    built = holder.build(images)
    assert b"".join(reads(built.fds[built.tables["fdinfo-1"][master]])) == waiting


def test_a_full_terminal_is_refused(holder: Holder) -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(slave, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(slave, b"x" * 100)
    pid = holder.give(master, slave)
    with pytest.raises(
        CannotMove, match=f"^fd [0-9]+ of PID {pid}: terminal with (so much unread data|stopped and unread)"
    ):
        holder.dump()


def test_an_end_of_file_in_the_input_stays(holder: Holder) -> None:
    _, _, our_master, our_slave = ends(holder)
    os.write(our_master, b"x\x04\x04y\n")
    holder.dump()
    assert reads(our_slave) == [b"x", b"", b"y\n"]
    for fd in (our_master, our_slave):
        os.close(fd)


@pytest.mark.parametrize("data", [b"", b"a", b"a\n", b"a\n\nb", b"\n"])
def test_lines_of_an_image(data: bytes) -> None:
    queues = from_image(data, b"out", canonical=True)
    assert queues.input == data
    assert all(line.endswith(b"\n") for line in queues.lines)
    assert from_image(data, b"out", canonical=False) == Queues((data,) if data else (), b"", b"out")


def test_locked_master_without_slave(holder: Holder) -> None:
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    index = number(master)
    holder.give(master)
    copy = holder.copy()
    assert number(copy[master]) == index
    assert struct.unpack("i", fcntl.ioctl(copy[master], TIOCGPTLCK, bytes(4))) == (1,)
    assert not os.get_blocking(copy[master])


def test_a_taken_number_is_refused(holder: Holder) -> None:
    *_, our_master, our_slave = ends(holder)
    images, _ = holder.dump()
    with pytest.raises(RestoreError, match=f"^terminal /dev/pts/{number(our_master)} is taken on this host$"):
        holder.build(images)
    for fd in (our_master, our_slave):
        os.close(fd)


@pytest.mark.parametrize("packets", [False, True], ids=["no slave", "packets"])
def test_output_that_cannot_be_put_back_is_refused(holder: Holder, packets: bool) -> None:
    master, slave = os.openpty()
    if packets:
        fcntl.ioctl(master, termios.TIOCPKT, struct.pack("i", 1))
    os.write(slave, b"unread")
    ours = os.dup(master)
    if packets:
        pid = holder.give(master, slave)
    else:
        os.close(slave)
        pid = holder.give(master)
    with pytest.raises(CannotMove, match=f"^fd {master} of PID {pid}: terminal .*unread"):
        holder.dump()
    if packets:
        assert reads(ours)[-1] == b"\0unread"
    os.close(ours)
