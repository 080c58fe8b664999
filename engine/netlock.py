"""Holding back the packets of TCP connections while nobody may answer them (nftables).

A connection whose process is stopped, or between two hosts, must not be answered by a kernel that knows too much
or too little of it. A lock is one table of its own with two sets of addresses, which are dropped in and out.

Such a table belongs to its maker (`flags owner`, Linux 5.12): it disappears with us, by whatever death, and the
connections go on. `outlive` adds one that stays, for a tree that stays stopped without us.

libnftables is used in our process: the table lives as long as the netlink socket that it was made through, which a
run of nft(8) would close at its end.
"""

from __future__ import annotations

import ctypes
import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final

LIBRARY: Final = "libnftables.so.1"
# Packets with this mark pass: segments that a restore makes up (phaul.engine.state.files.tcp).
PASS_MARK: Final = 0x70686175

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Connection:
    """The addresses of one TCP connection; an IPv4 address in IPv6 form is the IPv4 address."""

    local: str
    local_port: int
    peer: str
    peer_port: int

    def addresses(self) -> tuple[Address, Address]:
        """Local and peer, as they are in packets."""
        return _address(self.local), _address(self.peer)

    def directions(self) -> list[str]:
        """Both directions as elements of an nftables set."""
        local, peer = self.addresses()
        ends = (f"{local} . {self.local_port}", f"{peer} . {self.peer_port}")
        return [" . ".join(ends), " . ".join(reversed(ends))]


def _address(text: str) -> Address:
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(LIBRARY)
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    for name in ("nft_ctx_free", "nft_ctx_buffer_error", "nft_ctx_get_error_buffer"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    return library


def available() -> bool:
    """Whether libnftables is installed."""
    try:
        _library()
    except OSError:
        return False
    return True


def _table(name: str, connections: Iterable[Connection], flags: str) -> str:
    elements: dict[int, list[str]] = {4: [], 6: []}
    for connection in connections:
        elements[connection.addresses()[0].version] += connection.directions()
    sets, rules = "", ""
    for version, found in elements.items():
        if found:
            kind, ip = f"ipv{version}_addr", "ip" if version == 4 else "ip6"
            members = ", ".join(dict.fromkeys(found))
            key = f"{kind} . inet_service . {kind} . inet_service"
            sets += f"set v{version} {{ type {key}; elements = {{ {members} }}; }}; "
            rules += f"meta mark != {PASS_MARK} {ip} saddr . tcp sport . {ip} daddr . tcp dport @v{version} drop; "
    chains = "".join(
        f"chain {hook} {{ type filter hook {hook} priority raw; policy accept; {rules}}}; "
        for hook in ("input", "output")
    )
    return f"table inet {name} {{ {flags}{sets}{chains}}}"


class NetworkLock:
    """Packets of these connections are dropped, in our network namespace, until `release` or our death.

    Raises:
        OSError: libnftables is not installed, or the kernel refuses (no nf_tables, not root).
    """

    def __init__(self, connections: Iterable[Connection]) -> None:
        self._connections = list(connections)
        self._names: list[str] = []
        try:
            self._library = _library()
        except OSError as error:
            raise OSError(f"{LIBRARY} is missing: install the package nftables") from error
        self._context = self._library.nft_ctx_new(0)
        if not self._context:
            raise OSError("libnftables cannot be used")
        self._library.nft_ctx_buffer_error(self._context)
        try:
            self._add("flags owner; ")
        except OSError:
            self.leave()
            raise

    def outlive(self) -> None:
        """Drop the packets also after our death, until `release`; then `nft delete table` does it by hand."""
        self._add("")

    def release(self) -> None:
        """Let everything pass. Idempotent."""
        while self._context and self._names:
            self._run(f"delete table inet {self._names.pop()}")
        self.leave()

    def leave(self) -> None:
        """Let go of the lock; what `outlive` has made stays. Idempotent."""
        if self._context:
            self._library.nft_ctx_free(self._context)
            self._context = None

    def _add(self, flags: str) -> None:
        name = f"phaul-{secrets.token_hex(8)}"
        self._run(_table(name, self._connections, flags))
        self._names.append(name)

    def _run(self, command: str) -> None:
        if self._library.nft_run_cmd_from_buffer(self._context, command.encode()):
            text = (self._library.nft_ctx_get_error_buffer(self._context) or b"").decode(errors="replace")
            raise OSError(f"nftables: {text.strip().partition(chr(10))[0]}")
