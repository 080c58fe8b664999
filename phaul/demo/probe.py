"""The downtime as a client sees it: a PING every half millisecond, at both places.

A program of its own, run by path with `python -I` inside a host (standard library only):

    probe.py SOURCE DESTINATION PORT

Two threads make short connections, one to each address: connect, PING, read, close. As soon as
the destination has answered for the first time, the program goes on for a while, to see that the
source stays silent, prints one JSON object and ends:

    last_source         when the source answered last; CLOCK_MONOTONIC, seconds
    first_destination   when the destination answered first
    answers             how often the source answered
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

_INTERVAL = 0.0005
_TIMEOUT = 5.0
_WATCH_ON = 0.3
# Close by RST: 2,000 connections a second would else fill the ports with TIME_WAIT.
_NO_LINGER = struct.pack("ii", 1, 0)


def ping(address: str, port: int) -> bool:
    """Whether redis answers there. A frozen server is waited for, up to the timeout."""
    try:
        with socket.create_connection((address, port), _TIMEOUT) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            connection.sendall(b"PING\r\n")
            return connection.recv(16) == b"+PONG\r\n"
    except OSError:
        return False


def watch(address: str, port: int, answered: Callable[[float], None], stop: threading.Event) -> None:
    """Ping until `stop`; report the time of each answer."""
    while not stop.is_set():
        if ping(address, port):
            answered(time.monotonic())
        time.sleep(_INTERVAL)


def main(source: str, destination: str, port: int) -> None:
    """Probe until the server has moved, then print what was seen."""
    stop, moved = threading.Event(), threading.Event()
    from_source: list[float] = []
    from_destination: list[float] = []

    def arrived(when: float) -> None:
        from_destination.append(when)
        moved.set()

    for address, answered in ((source, from_source.append), (destination, arrived)):
        arguments = (address, port, answered, stop)
        threading.Thread(target=watch, args=arguments, daemon=True).start()
    moved.wait()
    time.sleep(_WATCH_ON)
    stop.set()
    seen = {
        "last_source": from_source[-1],
        "first_destination": from_destination[0],
        "answers": len(from_source),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
