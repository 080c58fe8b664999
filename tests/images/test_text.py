"""Names that are not UTF-8 survive in the fields that protobuf calls strings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul.images import codec
from phaul.images.pb.core_pb2 import thread_core_entry
from phaul.images.pb.fown_pb2 import fown_entry
from phaul.images.pb.regfile_pb2 import reg_file_entry
from phaul.images.text import get_bytes, put_bytes
from tests.images.crit_oracle import crit_rewrite


def reg_file(name: bytes) -> reg_file_entry:
    fown = fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    entry = reg_file_entry(id=1, flags=0, pos=0, fown=fown, name="to be replaced")
    put_bytes(entry, "name", name)
    return entry


@given(st.binary())
def test_any_bytes_survive(name: bytes) -> None:
    entry = reg_file(name)
    assert get_bytes(entry, "name") == name
    ((again, _),) = codec.decode("reg-files", codec.encode("reg-files", [(entry, b"")]))
    assert get_bytes(again, "name") == name
    assert again == entry


def test_long_values_and_field_numbers_beyond_15() -> None:
    entry = thread_core_entry(futex_rla=1, futex_rla_len=2)
    put_bytes(entry, "comm", b"x" * 300)
    assert entry.comm == "x" * 300


def test_valid_utf8_is_text_for_everybody_else(tmp_path: Path) -> None:
    entry = reg_file("/srv/größe".encode())
    assert entry.name == "/srv/größe"
    image, again = tmp_path / "reg-files.img", tmp_path / "again"
    image.write_bytes(codec.encode("reg-files", [(entry, b"")]))
    crit_rewrite(image, again)
    assert again.read_bytes() == image.read_bytes()


@pytest.mark.parametrize("field", ["id", "fown", "build_id", "nonsense"])
def test_only_string_fields_take_text(field: str) -> None:
    with pytest.raises(ValueError, match=f"reg_file_entry has no string field {field}"):
        put_bytes(reg_file(b""), field, b"x")
