"""Debian's crit reads what the kinds write, and sees in it what is there."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from phaul.images import catalog
from tests.engine.files.holding import Holder

CRIT = "/usr/bin/crit"


def decode(path: Path) -> list[dict[str, Any]]:
    """The entries of an image, by crit."""
    done = subprocess.run([CRIT, "decode", "-i", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    entries: list[dict[str, Any]] = json.loads(done.stdout)["entries"]
    return entries


@pytest.mark.root
def test_crit_decodes_every_image_of_files(holder: Holder, tmp_path: Path) -> None:
    regular = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    read, write = os.pipe()
    os.write(write, b"content")
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDWR)
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.send(b"queued")
    listener = socket.create_server(("127.0.0.1", 0), backlog=9)
    port = listener.getsockname()[1]
    named = socket.socket(socket.AF_UNIX)
    named.bind(str(tmp_path / "socket"))
    named.listen()
    event = os.eventfd(7)
    memory = os.memfd_create("memory")
    epoll = select.epoll()
    epoll.register(event, select.EPOLLIN)
    given = [
        regular, read, write, fifo, one.detach(), two.detach(), listener.detach(), named.detach(), event, memory
    ]  # fmt: skip
    holder.start(*given, epoll.fileno())
    epoll.close()
    for fd in given:
        os.close(fd)

    images, _ = holder.dump()

    found = {}
    for name in images.names():
        path = tmp_path / catalog.file_name(name)
        path.write_bytes(images.encode_file(name))
        found[name] = decode(path)
    assert set(found) == {"fdinfo-1", "files", "pipes-data", "fifo-data", "sk-queues", "memfd"}
    assert {entry["fd"] for entry in found["fdinfo-1"]} == {0, 1, 2, *given, max(given) + 1}
    assert {entry["type"] for entry in found["files"]} == {
        "REG", "PIPE", "FIFO", "INETSK", "UNIXSK", "EVENTFD", "EVENTPOLL", "MEMFD"
    }  # fmt: skip
    members: dict[str, dict[str, Any]] = {}
    for entry in found["files"]:
        members |= {f"{key}-{entry['id']}": value for key, value in entry.items() if isinstance(value, dict)}
    sockets = [value for key, value in members.items() if key.startswith("isk")]
    assert [(sock["src_port"], sock["backlog"], sock["state"]) for sock in sockets] == [(port, 9, 10)]
    assert any(value.get("name") == str(tmp_path / "file") for value in members.values())
    assert [entry["bytes"] for entry in found["pipes-data"]] == [7]
