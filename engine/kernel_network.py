"""Probes of what the kernel's network can do, for `engine/kernel_features.py`: see there.

They run in a child process that is thrown away, so nothing is closed and namespaces are entered for good.
Sources: netlink(7), rtnetlink(7), sock_diag(7), linux/if_link.h, linux/net_namespace.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Final

from phaul.engine import native, netlock

_SIOCUNIXFILE, _SIOCGSKNS = 0x89E0, 0x894C
_TCP_REPAIR, _SO_BUF_LOCK, _IPV6_FREEBIND = 19, 72, 78
_CLONE_NEWNET: Final = 0x40000000

_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_LINK = struct.Struct("=BxHiII")  # ifinfomsg
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x300
_NLM_F_CREATE: Final = 0x400 | 0x200  # with NLM_F_EXCL
_NLMSG_ERROR: Final = 2
_RTM_NEWLINK, _RTM_GETLINK, _RTM_GETNSID = 16, 18, 90
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_NET_NS_FD, _IFLA_LINK_NETNSID, _IFLA_NEW_IFINDEX = 3, 18, 28, 37, 49
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER, _NETNSA_PID = 1, 2, 1, 2
_SOCK_DIAG_BY_FAMILY, _NETLINK_SOCK_DIAG, _NETLINK_NETFILTER = 20, 4, 12
_NFNL_GETGEN: Final = 10 << 8 | 16  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        yield kind & 0x3FFF, data[4:length]
        data = data[length + 3 & -4 :]


def _ask(protocol: int, kind: int, flags: int, body: bytes) -> bytes:
    """The first answer, without its header. Raises OSError with the kernel's error."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as sock:
        sock.send(_HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, 1, 0) + body)
        answer = sock.recv(1 << 16)
    length, found, _, _, _ = _HEADER.unpack_from(answer)
    if found == _NLMSG_ERROR and (code := struct.unpack_from("=i", answer, _HEADER.size)[0]):
        raise OSError(-code, os.strerror(-code))
    return answer[_HEADER.size : length]


def _own_network() -> int:
    """Enter a new network namespace; a descriptor of it."""
    native.syscall("unshare", _CLONE_NEWNET)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def tun() -> None:
    os.open("/dev/net/tun", os.O_RDWR)


def tun_ns() -> None:
    """A tun device tells its network namespace."""
    fcntl.ioctl(os.open("/dev/net/tun", os.O_RDWR), _SIOCGSKNS)


def sk_ns() -> None:
    """A socket tells its network namespace."""
    fcntl.ioctl(socket.socket(socket.AF_UNIX), _SIOCGSKNS)


def sk_unix_file() -> None:
    """A bound unix socket tells its file."""
    with tempfile.TemporaryDirectory(prefix="phaul-check-") as directory:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(f"{directory}/socket")
        fcntl.ioctl(sock, _SIOCUNIXFILE)


def tcp_half_closed() -> None:
    """TCP_REPAIR can be set after shutdown(2)."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        sock.shutdown(socket.SHUT_WR)
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)


def sockopt_buf_lock() -> None:
    socket.socket().getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)


def ipv6_freebind() -> None:
    socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)


def diag_raw() -> None:
    """sock_diag(7) lists raw sockets, of IPv4 and IPv6."""
    for family in (socket.AF_INET, socket.AF_INET6):
        # inet_diag_req_v2: all states, no address
        body = struct.pack("=BBBxI48x", family, socket.IPPROTO_RAW, 0, 2**32 - 1)
        _ask(_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_DUMP, body)


def nsid() -> None:
    """Network namespaces have numbers in each other."""
    body = struct.pack("=B3x", 0) + _attribute(_NETNSA_PID, struct.pack("=I", os.getpid()))
    _ask(socket.NETLINK_ROUTE, _RTM_GETNSID, 0, body)


def link_nsid() -> bool:
    """One end of a veth pair tells the number of the namespace that the other end is in."""
    other = _own_network()
    _own_network()
    peer = _LINK.pack(0, 0, 0, 0, 0) + _attribute(_IFLA_NET_NS_FD, struct.pack("=I", other))
    info = _attribute(_IFLA_INFO_KIND, b"veth") + _attribute(_IFLA_INFO_DATA, _attribute(_VETH_INFO_PEER, peer))
    link = _LINK.pack(0, 0, 0, 0, 0) + _attribute(_IFLA_IFNAME, b"ph0\0") + _attribute(_IFLA_LINKINFO, info)
    _ask(socket.NETLINK_ROUTE, _RTM_NEWLINK, _NLM_F_ACK | _NLM_F_CREATE, link)
    wanted = _LINK.pack(0, 0, socket.if_nametoindex("ph0"), 0, 0)
    answer = _ask(socket.NETLINK_ROUTE, _RTM_GETLINK, 0, wanted)
    return any(kind == _IFLA_LINK_NETNSID for kind, _ in _attributes(answer[_LINK.size :]))


def newifindex() -> bool:
    """A device can be given an index when it is moved. Kernels that know the attribute refuse a negative one."""
    _own_network()
    body = _LINK.pack(0, 0, 1, 0, 0) + _attribute(_IFLA_NEW_IFINDEX, struct.pack("=i", -2))
    try:
        _ask(socket.NETLINK_ROUTE, _RTM_NEWLINK, _NLM_F_ACK, body)
    except OSError as error:
        return error.errno == errno.ERANGE
    return False


def nftables() -> None:
    """The kernel has nftables: it tells the generation of its rules."""
    _ask(_NETLINK_NETFILTER, _NFNL_GETGEN, 0, struct.pack("=BBH", 0, 0, 0))


def nftables_concatenation() -> None:
    """Sets of addresses and ports together, as a lock of connections has them."""
    _own_network()
    netlock.NetworkLock([netlock.Connection("127.0.0.1", 1, "127.0.0.1", 2)])


def iptables_legacy() -> bool:
    """iptables(8) and ip6tables(8) that do not work by way of nftables."""
    return all(any(map(_is_legacy, (f"{name}-legacy", name))) for name in ("iptables", "ip6tables"))


def _is_legacy(program: str) -> bool:
    path = shutil.which(program)
    if path is None:
        return False
    version = subprocess.run([path, "-V"], capture_output=True, text=True, check=False)
    return version.returncode == 0 and "nf_tables" not in version.stdout
