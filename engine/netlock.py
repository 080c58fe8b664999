"""Holding back the packets of TCP connections while nobody may answer them (nftables).

A connection whose process is stopped, or between two hosts, must not be answered by a kernel that knows too much
or too little of it. A lock is one table of its own with two sets of addresses, which are dropped in and out.

Such a table belongs to its maker (`flags owner`, Linux 5.12): it disappears with us, by whatever death, and the
connections go on. For a tree that stays stopped without us, or lives in its images only, there is one more table, whose
sets hold what must not be answered until the tree runs again: a packet that finds no socket is answered by a reset.

libnftables is used in our process: the table lives as long as the netlink socket that it was made through, which a
run of nft(8) would close at its end.
"""

from __future__ import annotations

import ctypes
import ipaddress
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

HELD: Final = "phaul-held"
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
    for name in ("nft_ctx_free", "nft_ctx_buffer_error", "nft_ctx_buffer_output", "nft_ctx_get_error_buffer"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    return library


def available() -> bool:
    """Whether libnftables is installed."""
    try:
        _library()
    except OSError:
        return False
    return True


def _elements(connections: Iterable[Connection]) -> dict[int, str]:
    """IP version -> elements of a set, without versions that there are none of."""
    found: dict[int, dict[str, None]] = {}
    for connection in connections:
        found.setdefault(connection.addresses()[0].version, {}).update(dict.fromkeys(connection.directions()))
    return {version: ", ".join(elements) for version, elements in found.items()}


def _table(name: str) -> list[str]:
    """Commands that make a table with empty sets, whether it is there or not."""
    commands, rules = [f"add table inet {name}"], []
    for version, ip in ((4, "ip"), (6, "ip6")):
        kind = f"ipv{version}_addr . inet_service"
        commands.append(f"add set inet {name} v{version} {{ type {kind} . {kind}; }}")
        rules.append(f"meta mark != {PASS_MARK} {ip} saddr . tcp sport . {ip} daddr . tcp dport @v{version} drop")
    for hook in ("input", "output"):
        commands.append(f"add chain inet {name} {hook} {{ type filter hook {hook} priority raw; policy accept; }}")
        commands.append(f"flush chain inet {name} {hook}")
        commands += [f"add rule inet {name} {hook} {rule}" for rule in rules]
    return commands


class NetworkLock:
    """Packets of these connections are dropped, in our network namespace, until `release` or our death.

    Raises:
        OSError: libnftables is not installed, or the kernel refuses (no nf_tables, not root).
    """

    def __init__(self, connections: Iterable[Connection]) -> None:
        self._elements = _elements(connections)
        try:
            self._library = _library()
        except OSError as error:
            raise OSError(f"{LIBRARY} is missing: install the package nftables") from error
        self._context = self._library.nft_ctx_new(0)
        if not self._context:
            raise OSError("libnftables cannot be used")
        self._library.nft_ctx_buffer_error(self._context)
        self._library.nft_ctx_buffer_output(self._context)
        name = f"phaul-{secrets.token_hex(8)}"
        _, *rest = _table(name)
        try:
            self._run([f"add table inet {name} {{ flags owner; }}", *rest, *self._each("add", name)])
        except OSError:
            self.leave()
            raise

    def outlive(self) -> None:
        """Drop the packets also after our death, until a `release` for the same connections, by whomever."""
        self._run([*_table(HELD), *self._each("add", HELD)])

    def release(self) -> None:
        """Let everything pass. Idempotent."""
        if self._context and self._is_there(HELD):
            # What is not in a set cannot be deleted from it.
            self._run([*self._each("add", HELD), *self._each("delete", HELD)])
        self.leave()

    def leave(self) -> None:
        """Let go of the lock; what `outlive` has made stays. Idempotent."""
        if self._context:
            self._library.nft_ctx_free(self._context)
            self._context = None

    def _each(self, verb: str, table: str) -> list[str]:
        return [f"{verb} element inet {table} v{version} {{ {text} }}" for version, text in self._elements.items()]

    def _is_there(self, table: str) -> bool:
        return not self._library.nft_run_cmd_from_buffer(self._context, f"list table inet {table}".encode())

    def _run(self, commands: Sequence[str]) -> None:
        """All of them or none: one transaction."""
        if self._library.nft_run_cmd_from_buffer(self._context, "\n".join(commands).encode()):
            text = (self._library.nft_ctx_get_error_buffer(self._context) or b"").decode(errors="replace")
            raise OSError(f"nftables: {text.strip().partition(chr(10))[0]}")
