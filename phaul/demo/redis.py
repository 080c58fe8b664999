"""The few words of redis's protocol (RESP2) that the demo speaks."""

from __future__ import annotations

import socket

from phaul.errors import PhaulError

_KEYS_IN_FLIGHT = 10_000


class Redis:
    """A client on a connected socket, which it owns; close it by `with`."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._reader = sock.makefile("rb")

    def __enter__(self) -> Redis:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._socket.close()

    def command(self, *words: str) -> str:
        """Run one command; a bulk, simple or integer reply as text.

        Raises:
            PhaulError: redis answers with an error, or with anything else.
            OSError: the connection is lost.
        """
        self._socket.sendall(_request(*(word.encode() for word in words)))
        line = self._line()
        kind, rest = line[:1], line[1:].decode()
        if kind in (b"+", b":"):
            return rest
        if kind == b"$" and rest != "-1":
            return self._reader.read(int(rest) + 2)[:-2].decode()
        raise PhaulError(f"redis answers {' '.join(words)} with {line.decode()}")

    def info(self, field: str) -> str:
        """One field of INFO.

        Raises:
            PhaulError: there is no such field.
        """
        for line in self.command("INFO").splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return value
        raise PhaulError(f"redis knows no {field}")

    def fill(self, keys: int) -> None:
        """Set `user:0` to `user:N-1`, each to a record of some 100 bytes.

        Raises:
            PhaulError: redis did not take one of them.
        """
        for start in range(0, keys, _KEYS_IN_FLIGHT):
            block = range(start, min(start + _KEYS_IN_FLIGHT, keys))
            self._socket.sendall(b"".join(map(_set, block)))
            if any(self._line() != b"+OK" for _ in block):
                raise PhaulError("redis did not take all keys")

    def _line(self) -> bytes:
        line = self._reader.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("redis closed the connection")
        return line[:-2]


def _request(*words: bytes) -> bytes:
    return b"*%d\r\n%s" % (len(words), b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))


def _set(number: int) -> bytes:
    # Multiplicative hashing: different in each record, the same in each run.
    token = number * 0x9E3779B97F4A7C15 % (1 << 64)
    record = b'{"id": %d, "mail": "user%d@example.org", "visits": %d, "token": "%016x"}'
    return _request(b"SET", b"user:%d" % number, record % (number, number, token % 1000, token))
