"""Where an agent listens: `tcp://HOST:PORT` and `unix:///PATH`.

An end point is parsed once, at the edge (command line), and is a value from then on. Both kinds
give plain blocking stream sockets: what runs over them is the business of other modules.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from phaul.errors import PeerError, UsageError

SUPPORTED = "tcp://HOST:PORT, unix:///PATH"

# Pending connections: two for each migration that starts (control and pages).
BACKLOG = 64

_HOST_PORT = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<name>[^:\[\]/]*)):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True)
class TcpEndpoint:
    """A TCP address.

    Attributes:
        host: name or literal address, without the brackets of a v6 literal.
        port: 0 to 65535; 0 lets the kernel choose when listening.
    """

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """True when nobody outside this machine can be at the other end."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError:
            return False
        return all(ipaddress.ip_address(info[4][0]).is_loopback for info in found)

    def connect(self, timeout: float) -> socket.socket:
        """Open a connection.

        Args:
            timeout: seconds for the whole attempt; the socket comes back in blocking mode.

        Raises:
            PeerError: nobody there.
        """
        try:
            sock = socket.create_connection((self.host, self.port), timeout)
        except OSError as error:
            raise unreachable(self, error) from error
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def listen(self) -> socket.socket:
        """Open a listening, non-blocking socket.

        Raises:
            UsageError: the address is taken, or is none of ours.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = found[0]
            sock = socket.socket(family, kind, protocol)
        except OSError as error:
            raise UsageError(f"cannot listen on {self}: {error.strerror}") from error
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise UsageError(f"cannot listen on {self}: {error.strerror}") from error
        sock.setblocking(False)
        return sock

    def bound(self, sock: socket.socket) -> TcpEndpoint:
        """This end point with the port that the kernel gave to a listening socket."""
        return TcpEndpoint(self.host, int(sock.getsockname()[1]))

    def forget(self) -> None:
        """Clean up after the listening socket was closed (TCP: nothing stays)."""


@dataclass(frozen=True)
class UnixEndpoint:
    """A unix stream socket in the file system.

    Attributes:
        path: absolute path, at most 107 bytes (unix(7)).
    """

    path: str

    is_local = True

    def __str__(self) -> str:
        return f"unix://{self.path}"

    def connect(self, timeout: float) -> socket.socket:
        """Open a connection; see `TcpEndpoint.connect`."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect(self.path)
        except OSError as error:
            sock.close()
            raise unreachable(self, error) from error
        sock.settimeout(None)
        return sock

    def listen(self) -> socket.socket:
        """Open a listening, non-blocking socket that only its owner can connect to.

        A socket file that a dead agent left behind is replaced; a living one is not.

        Raises:
            UsageError: somebody listens there, or the path cannot be made.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._remove_stale()
            sock.bind(self.path)
            # Before listen() nobody can connect, so there is no moment at which others may.
            os.chmod(self.path, 0o600)
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise UsageError(f"cannot listen on {self}: {error.strerror}") from error
        sock.setblocking(False)
        return sock

    def bound(self, sock: socket.socket) -> UnixEndpoint:
        """This end point: the kernel changes nothing about it."""
        return self

    def forget(self) -> None:
        """Remove the socket file, after the listening socket was closed."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _remove_stale(self) -> None:
        path = Path(self.path)
        try:
            if not stat.S_ISSOCK(path.lstat().st_mode):
                return
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                path.unlink()


Endpoint = TcpEndpoint | UnixEndpoint


def unreachable(endpoint: Endpoint, error: OSError) -> PeerError:
    """The error for a connection that could not be made."""
    if isinstance(error, TimeoutError):
        reason = "no answer in time"
    elif error.errno is not None and error.errno > 0:
        reason = os.strerror(error.errno)  # asyncio has words of its own in strerror
    else:
        reason = error.strerror or str(error)  # a name that cannot be resolved
    return PeerError(f"cannot reach {endpoint}: {reason}")


def parse(text: str) -> Endpoint:
    """Parse an end point.

    Args:
        text: `tcp://host:port`, `tcp://[v6]:port` or `unix:///absolute/path`.

    Raises:
        UsageError: not an end point, or of a scheme that phaul does not speak.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise UsageError(f"{text!r} is not an address (supported: {SUPPORTED})")
    if scheme == "tcp":
        return _parse_tcp(text, rest)
    if scheme == "unix":
        if not rest.startswith("/") or "\0" in rest:
            raise UsageError(f"{text!r}: unix needs an absolute path, as in unix:///run/phaul")
        if len(os.fsencode(rest)) > 107:
            raise UsageError(f"{text!r}: a unix socket path has at most 107 bytes")
        return UnixEndpoint(rest)
    raise UsageError(f"{text!r}: unknown scheme {scheme!r} (supported: {SUPPORTED})")


def _parse_tcp(text: str, rest: str) -> TcpEndpoint:
    match = _HOST_PORT.fullmatch(rest)
    if match is None:
        raise UsageError(f"{text!r}: expected tcp://HOST:PORT (v6: tcp://[ADDRESS]:PORT)")
    host, port = match["v6"] or match["name"], int(match["port"])
    if not host:
        raise UsageError(f"{text!r}: the host is missing")
    if match["v6"] is not None:
        try:
            # The zone of a link-local address ("fe80::1%eth0") is getaddrinfo's business.
            ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError as error:
            raise UsageError(f"{text!r}: {host!r} is not an IPv6 address") from error
    if port > 65535:
        raise UsageError(f"{text!r}: port {port} is above 65535")
    return TcpEndpoint(host, port)
