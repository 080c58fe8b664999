"""Debian's crit reads what we write: for each kind of image that it knows, field by field."""

from __future__ import annotations

import base64
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from phaul.images import catalog, codec
from tests.images.crit_oracle import CRIT, crit_decode, crit_rewrite
from tests.images.records import NAMES, sample_records

# What CRIU 4.2 has and crit 3.17.1 has not.
UNKNOWN_KINDS = {
    "binfmt-misc",
    "binfmt-misc-123",
    "pidfd",
    "signal-p-123",
    "signal-s-123",
}
# crit reads the content of a System V segment also where it is in a page map, and cannot encode
# the content of a BPF map ("expected bytes-like object, not str").
NOT_REWRITTEN = {"ipcns-shm-123", "bpfmap-data"}

# Fields that are newer than crit 3.17.1, or ours: it drops them.
NEW_FIELDS = {
    "cg_controller_entry.is_threaded",
    "creds_entry.cap_amb",
    "creds_entry.no_new_privs",
    "file_entry.pidfd",
    "inet_sk_entry.tcp_opts",
    "inventory_entry.allow_uprobes",
    "inventory_entry.dump_criu_run_id",
    "inventory_entry.plugins_entry",
    "ip_opts_entry.pktinfo",
    "ip_opts_entry.tos",
    "ip_opts_entry.ttl",
    "memfd_inode_entry.mode",
    "netns_entry.ipv4_sysctl",
    "pagemap_entry.nr_pages",
    "task_core_entry.membarrier_registration_mask",
    "task_core_entry.stop_signo",
    "thread_core_entry.cg_set",
    "thread_core_entry.cpu_affinity",
    "user_x86_xsave_entry.cet",
}


@cache
def crit_magics() -> dict[int, str]:
    """The magics that crit has a reader for, with its names for them."""
    code = (
        "from pycriu.images import images, magic\n"
        "for name in set(images.handlers) & set(magic.by_name): print(magic.by_name[name], name)"
    )
    done = subprocess.run([CRIT[0], "-E", "-c", code], capture_output=True, text=True, check=True)
    return {int(line.split()[0]): line.split()[1] for line in done.stdout.splitlines()}


def test_magics_are_those_of_crit() -> None:
    ours = {name: catalog.lookup(name).magic for name in NAMES}
    assert {name for name in NAMES if ours[name] not in crit_magics()} == UNKNOWN_KINDS
    assert set(crit_magics()) <= set(ours.values())


@pytest.mark.parametrize("name", [*sorted(NOT_REWRITTEN), "core-123", "pagemap-123", "sk-queues"])
def test_crit_reads_what_we_write(name: str, tmp_path: Path) -> None:
    image = tmp_path / catalog.file_name(name)
    records = sample_records(name)
    if name == "ipcns-shm-123":
        records = [record for record in records if record[1]]
    image.write_bytes(codec.encode(name, records))
    decoded = crit_decode(image)
    assert len(decoded) == len(records)
    for (message, extra), entry in zip(records, decoded, strict=True):
        assert not set(entry) - {field.name for field in message.DESCRIPTOR.fields} - {"extra"}
        if isinstance(entry.get("extra"), str):
            assert extra.startswith(base64.b64decode(entry["extra"]))


@pytest.mark.parametrize("name", sorted(set(NAMES) - UNKNOWN_KINDS - NOT_REWRITTEN))
def test_crit_reads_every_kind_and_writes_the_same(name: str, tmp_path: Path) -> None:
    image, again = tmp_path / catalog.file_name(name), tmp_path / "again"
    records = sample_records(name)
    image.write_bytes(codec.encode(name, records))
    crit_rewrite(image, again)
    rewritten = codec.decode(name, again.read_bytes())
    assert [extra for _, extra in rewritten] == [extra for _, extra in records]
    lost = set[str]()
    for (ours, _), (theirs, _) in zip(records, rewritten, strict=True):
        lost |= lost_fields(ours, theirs)
    assert lost <= NEW_FIELDS


def lost_fields(ours: Message, theirs: Message) -> set[str]:
    """Names the fields that only we have; fails if a field that both have differs."""
    name, lost = ours.DESCRIPTOR.name, set[str]()
    for field in ours.DESCRIPTOR.fields:
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if is_set(ours, field) and not is_set(theirs, field):
            lost.add(f"{name}.{field.name}")
        elif field.message_type is None:
            assert mine == other, f"{name}.{field.name}"
        else:
            pairs: list[tuple[Any, Any]] = [(mine, other)]
            if field.is_repeated:
                pairs = list(zip(mine, other, strict=True))
            for mine_part, other_part in pairs:
                lost |= lost_fields(mine_part, other_part)
    return lost


def is_set(message: Message, field: Any) -> bool:
    if field.is_repeated:
        return len(getattr(message, field.name)) > 0
    return message.HasField(field.name)
