"""Plain TCP between two hosts: what a migration is measured against.

A program of its own, run by path inside a host (standard library only):

    tcp.py receive ADDRESS PORT           takes one connection to its end, prints bytes and seconds
    tcp.py send ADDRESS PORT BYTES        sends so many bytes, 1 MiB at a time
"""

from __future__ import annotations

import json
import socket
import sys
import time

_BUFFER = 1 << 20


def receive(address: str, port: int) -> None:
    """Print {"bytes", "seconds"} of one connection, from its first byte to its end."""
    buffer = bytearray(_BUFFER)
    with socket.create_server((address, port)) as server:
        connection, _ = server.accept()
    with connection:
        total = connection.recv_into(buffer)
        begin = time.monotonic()
        while count := connection.recv_into(buffer):
            total += count
        print(json.dumps({"bytes": total, "seconds": time.monotonic() - begin}))


def send(address: str, port: int, size: int) -> None:
    """Send `size` bytes (a multiple of 1 MiB)."""
    buffer = bytes(range(256)) * (_BUFFER // 256)
    with socket.create_connection((address, port)) as connection:
        for _ in range(size // _BUFFER):
            connection.sendall(buffer)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(sys.argv[2], int(sys.argv[3]))
    else:
        send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
