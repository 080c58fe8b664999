"""End points: what is one, what is not, and connecting to it."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from phaul.errors import PeerError, UsageError
from phaul.transport.endpoint import TcpEndpoint, UnixEndpoint, parse


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("tcp://127.0.0.1:7000", TcpEndpoint("127.0.0.1", 7000)),
        ("tcp://some-host.example:1", TcpEndpoint("some-host.example", 1)),
        ("tcp://[::1]:65535", TcpEndpoint("::1", 65535)),
        ("tcp://[fe80::1%lo]:0", TcpEndpoint("fe80::1%lo", 0)),
        ("unix:///run/phaul.sock", UnixEndpoint("/run/phaul.sock")),
    ],
)
def test_parse_and_print_are_inverse(text: str, endpoint: TcpEndpoint | UnixEndpoint) -> None:
    assert parse(text) == endpoint
    assert str(endpoint) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("somehost", "tcp://HOST:PORT, unix:///PATH"),
        ("somehost:7000", "tcp://HOST:PORT, unix:///PATH"),
        ("ssh://root@host", "unknown scheme 'ssh' (supported: tcp://HOST:PORT, unix:///PATH)"),
        ("tcp://host", "expected tcp://HOST:PORT"),
        ("tcp://host:", "expected tcp://HOST:PORT"),
        ("tcp://host:http", "expected tcp://HOST:PORT"),
        ("tcp://host:70000", "port 70000 is above 65535"),
        ("tcp://:7000", "the host is missing"),
        ("tcp://::1:7000", "expected tcp://HOST:PORT"),
        ("tcp://[host]:7000", "'host' is not an IPv6 address"),
        ("tcp://host:7000/path", "expected tcp://HOST:PORT"),
        ("unix://relative", "absolute path"),
        ("unix:///" + "x" * 107, "at most 107 bytes"),
    ],
)
def test_what_is_no_endpoint_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert says in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.3.2.1:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://localhost:1", True),
        ("unix:///x", True),
        ("tcp://0.0.0.0:1", False),
        ("tcp://[::]:1", False),
        ("tcp://192.0.2.1:1", False),
        ("tcp://no-such-host.invalid:1", False),
    ],
)
def test_only_loopback_and_unix_are_local(text: str, local: bool) -> None:
    assert parse(text).is_local is local


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_tcp_listens_on_a_port_of_the_kernels_choice(host: str) -> None:
    endpoint = parse(f"tcp://{host}:0")
    with endpoint.listen() as listener:
        bound = endpoint.bound(listener)
        assert isinstance(bound, TcpEndpoint)
        assert bound.port == listener.getsockname()[1] != 0
        with bound.connect(5) as client:
            assert client.gettimeout() is None
            assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_taken_port_is_named() -> None:
    endpoint = parse("tcp://127.0.0.1:0")
    with endpoint.listen() as listener:
        taken = endpoint.bound(listener)
        with pytest.raises(UsageError, match=f"cannot listen on {taken}: Address already"):
            taken.listen()


def test_nobody_there() -> None:
    endpoint = parse("tcp://127.0.0.1:0")
    with endpoint.listen() as listener:
        bound = endpoint.bound(listener)
    with pytest.raises(PeerError, match=f"cannot reach {bound}: Connection refused"):
        bound.connect(5)


def test_unix_socket_is_private_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    endpoint = parse(f"unix://{path}")
    with endpoint.listen():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        endpoint.connect(5).close()
    endpoint.forget()
    assert not path.exists()
    with pytest.raises(PeerError, match="No such file"):
        endpoint.connect(5)


def test_unix_socket_of_a_dead_agent_is_replaced_of_a_living_one_not(tmp_path: Path) -> None:
    endpoint = parse(f"unix://{tmp_path / 'agent'}")
    endpoint.listen().close()
    assert os.path.exists(tmp_path / "agent")
    with endpoint.listen(), pytest.raises(UsageError, match="Address already in use"):
        endpoint.listen()


def test_unix_never_replaces_what_is_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(UsageError, match="Address already in use"):
        parse(f"unix://{path}").listen()
    assert path.read_text() == "precious"
