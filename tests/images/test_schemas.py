"""The schemas: the generated code is theirs, and they are a superset of Debian's CRIU."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
)

from phaul.images import generate
from tests.images.crit_oracle import CRIT

PB = Path(generate.__file__).parent / "pb"

# (name, type, label, type name, default value) of a field; the number of an enum's value.
Facts = dict[str, object]

# The u32 that 4.2 calls compat_nr_pages was nr_pages in 3.17.1.
RENAMED = {"nr_pages": "compat_nr_pages"}


def test_the_checked_in_code_is_what_the_schemas_give(tmp_path: Path) -> None:
    fresh = {path.name: path.read_bytes() for path in generate.compile_schemas(tmp_path)}
    checked_in = {path.name: path.read_bytes() for path in PB.glob("*_pb2.py*")}
    assert fresh.keys() == checked_in.keys()
    assert [name for name in fresh if fresh[name] != checked_in[name]] == []


def test_another_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "COMPILER_VERSION", "1.0.0")
    with pytest.raises(RuntimeError, match=r"needs grpcio-tools 1\.0\.0, found 1\.\d+"):
        generate.compile_schemas(tmp_path)


def test_nothing_of_crius_is_gone_or_different() -> None:
    ours: Facts = {}
    for path in PB.glob("*_pb2.py"):
        module = import_module(f"phaul.images.pb.{path.stem}")
        ours |= file_facts(FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb))
    theirs: Facts = {}
    for file in debian_schemas():
        theirs |= file_facts(file)
    assert len(theirs) > 800
    assert {key: fact for key, fact in theirs.items() if ours.get(key) != fact} == {}


def debian_schemas() -> Iterator[FileDescriptorProto]:
    """All schemas of Debian's pycriu, without RPC, streaming and other architectures."""
    code = """
import base64, glob, importlib, os, pycriu.images
for path in sorted(glob.glob(os.path.dirname(pycriu.images.__file__) + "/*_pb2.py")):
    module = importlib.import_module(os.path.basename(path)[:-3])
    print(base64.b64encode(module.DESCRIPTOR.serialized_pb).decode())
"""
    done = subprocess.run([CRIT[0], "-E", "-c", code], capture_output=True, text=True, check=True)
    left_out = {"rpc.proto", "img-streamer.proto", "google/protobuf/descriptor.proto"}
    for line in done.stdout.splitlines():
        file = FileDescriptorProto.FromString(base64.b64decode(line))
        foreign = file.name.startswith("core-") and file.name != "core-x86.proto"
        if not foreign and file.name not in left_out:
            yield file


def file_facts(file: FileDescriptorProto) -> Facts:
    """Facts by `message.number` and `enum.VALUE`."""
    facts: Facts = {}
    for enum in file.enum_type:
        facts |= enum_facts(enum, "")
    for message in file.message_type:
        facts |= message_facts(message)
    return facts


def message_facts(message: DescriptorProto) -> Facts:
    facts: Facts = {}
    for field in message.field:
        type_name = field.type_name.rpartition(".")[2]
        if type_name.startswith("thread_info_") and type_name != "thread_info_x86":
            continue
        facts[f"{message.name}.{field.number}"] = (
            RENAMED.get(field.name, field.name),
            *(field.type, field.label, type_name, field.default_value),
        )
    for enum in message.enum_type:
        facts |= enum_facts(enum, f"{message.name}.")
    return facts


def enum_facts(enum: EnumDescriptorProto, prefix: str) -> Facts:
    return {f"{prefix}{enum.name}.{value.name}": value.number for value in enum.value}
