"""What the framing costs: pages from this process's memory over loopback, beside plain TCP.

    python -m phaul.pageserver.throughput [MIB]

The pages are read with process_vm_readv (of this very process) and copied into a second
buffer at the other end, so the figure includes the memory work of a migration but no
skeleton, no faults and no second machine.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence

from phaul.images.pagemap import PAGE_SIZE, PageRange
from phaul.pageserver.receiver import PageReceiver
from phaul.pageserver.sender import FRAME_DATA, PageSender
from phaul.transport.endpoint import TcpEndpoint

TARGET = "pagemap-1"
READY = b"r"


def plain(size: int, chunk: int = 1 << 20) -> float:
    """Bytes a second of sendall() to recv_into() over loopback TCP."""

    def send(sock: socket.socket) -> None:
        data = memoryview(mmap.mmap(-1, chunk))
        for _ in range(size // chunk):
            sock.sendall(data)

    def receive(sock: socket.socket) -> None:
        buffer = bytearray(chunk)
        left = size
        while left:
            left -= sock.recv_into(buffer, min(left, chunk))

    return size / _timed(send, receive)


def framed(size: int, frame_data: int = FRAME_DATA) -> float:
    """Bytes a second of the page stream: read, hash, send | receive, check, write."""
    source, target = mmap.mmap(-1, size), mmap.mmap(-1, size)
    _touch(source, 1)
    base = ctypes.addressof(ctypes.c_char.from_buffer(source))
    destination = memoryview(target)

    def read(name: str, ranges: Sequence[PageRange], buffer: memoryview) -> None:
        _process_vm_readv(os.getpid(), ranges, base, buffer)

    def write(name: str, ranges: Sequence[PageRange], data: memoryview) -> None:
        for item in ranges:
            destination[item.vaddr : item.end] = data[: item.size]
            data = data[item.size :]

    def send(sock: socket.socket) -> None:
        sender = PageSender(sock, read, frame_data)
        sender.send([(TARGET, [PageRange(0, size // PAGE_SIZE)])])
        sender.end()

    def receive(sock: socket.socket) -> None:
        PageReceiver(sock, write).run()

    rate = size / _timed(send, receive, prepare=lambda: _touch(target, 0))
    if target[:] != source[:]:
        raise AssertionError("the pages have not arrived as they were")
    return rate


def _touch(area: mmap.mmap, step: int) -> None:
    # No page faults in what is measured; with a step of 0 all pages are equal.
    for page, offset in enumerate(range(0, len(area), PAGE_SIZE)):
        area[offset] = page * step & 0xFF


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)


def _process_vm_readv(pid: int, ranges: Sequence[PageRange], base: int, buffer: memoryview) -> None:
    # Without the engine: this module measures the floors below it.
    local = _Iovec(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), len(buffer))
    remote = (_Iovec * len(ranges))(*[_Iovec(base + item.vaddr, item.size) for item in ranges])
    got = _libc.process_vm_readv(pid, ctypes.byref(local), ctypes.c_ulong(1), remote, ctypes.c_ulong(len(ranges)), 0)
    if got != len(buffer):
        raise OSError(ctypes.get_errno(), "process_vm_readv")


def _timed(
    send: Callable[[socket.socket], None],
    receive: Callable[[socket.socket], None],
    prepare: Callable[[], None] = lambda: None,
) -> float:
    # Two processes, as two agents are: threads of one would contend for its GIL.
    endpoint = TcpEndpoint("127.0.0.1", 0)
    with endpoint.listen() as listener:
        listener.setblocking(True)
        ours = endpoint.bound(listener).connect(5)
        theirs, _ = listener.accept()
    child = os.fork()
    if not child:
        try:
            ours.close()
            prepare()
            theirs.send(READY)
            receive(theirs)
            os._exit(0)
        finally:
            os._exit(1)
    theirs.close()
    with ours:
        ours.recv(len(READY))
        begin = time.monotonic()
        send(ours)
        _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - begin
    if status:
        raise AssertionError(f"the receiver failed with status {status}")
    return seconds


def main() -> None:
    """Print both figures and their ratio."""
    size = int(sys.argv[1] if len(sys.argv) > 1 else 1024) << 20
    reference, ours = plain(size), framed(size)
    print(f"plain TCP     {reference / 1e9:6.2f} GB/s")
    print(f"page stream   {ours / 1e9:6.2f} GB/s   {ours / reference:.2f} of plain TCP")


if __name__ == "__main__":
    main()
