"""Whole buffers over a socket: all of it, or an error in time."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from phaul.errors import PeerError
from phaul.transport.stream import recv_exactly, send_all, set_stall_timeout

STALL = 0.2


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        set_stall_timeout(left, STALL)
        set_stall_timeout(right, STALL)
        yield left, right


def test_megabytes_arrive_whole(pair: tuple[socket.socket, socket.socket]) -> None:
    data = os.urandom(3 << 20)
    got = bytearray(len(data))
    sender = threading.Thread(target=send_all, args=(pair[0], memoryview(data)))
    sender.start()
    recv_exactly(pair[1], memoryview(got))
    sender.join()
    assert got == data


def test_a_slow_sender_is_no_dead_one(pair: tuple[socket.socket, socket.socket]) -> None:
    def drip() -> None:
        for _ in range(6):
            time.sleep(STALL / 2)
            pair[0].send(b"x")

    sender = threading.Thread(target=drip)
    sender.start()
    got = bytearray(6)
    recv_exactly(pair[1], memoryview(got))  # takes three times the stall timeout
    sender.join()
    assert got == b"x" * 6


def test_silence_within_a_buffer(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].send(b"half")
    begin = time.monotonic()
    with pytest.raises(PeerError, match="gone silent"):
        recv_exactly(pair[1], memoryview(bytearray(8)), idle_timeout=60)
    assert time.monotonic() - begin < 10 * STALL


def test_silence_before_a_buffer_may_last_longer(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    timer = threading.Timer(STALL * 2, pair[0].send, (b"late",))
    timer.start()
    got = bytearray(4)
    recv_exactly(pair[1], memoryview(got), idle_timeout=60)
    assert got == b"late"
    with pytest.raises(PeerError, match="gone silent"):
        recv_exactly(pair[1], memoryview(got), idle_timeout=STALL)


def test_nobody_reads(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(PeerError, match="takes no more data"):
        send_all(pair[0], memoryview(bytes(64 << 20)))


def test_the_other_side_is_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].close()
    with pytest.raises(PeerError, match="closed the connection too early"):
        recv_exactly(pair[0], memoryview(bytearray(1)))
    with pytest.raises(PeerError, match="Broken pipe"):
        send_all(pair[0], b"anybody?")
