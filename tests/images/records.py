"""Records for tests: one full sample of every kind of image, and random ones (Hypothesis)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from phaul.images import catalog
from phaul.images.codec import Record
from phaul.images.pb.ipc_msg_pb2 import ipc_msg
from phaul.images.pb.opts_pb2 import criu

_BITS = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_FIXED64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SINT64: (-(2**63), 2**63 - 1),
}

# Deep enough for core_entry > tc > timers > real; cgroup directories nest without end.
_DEPTH = 4


def example_name(image_type: catalog.ImageType) -> str:
    """Returns one name of the kind, such as "core-123"."""
    return image_type.pattern.replace("%u", "123").replace("%x", "1f3")


NAMES = [example_name(image_type) for image_type in catalog.TYPES]


def sample_records(name: str) -> list[Record]:
    """Returns two or three records with every field set, each number another one."""
    image_type = catalog.lookup(name)
    numbers = itertools.count(1)
    records = []
    for index in range(3):
        message = _filled(image_type.message_class(index), numbers, _DEPTH)
        records.append((message, _fit(message, bytes(range(40 + index)))))
    return _drop_impossible(records)


def _filled(cls: type[Message], numbers: Iterator[int], depth: int) -> Message:
    message = cls()
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    for field in fields:
        if field.message_type is not None:
            if depth == 0:
                continue
            parts = [_filled(_class_of(field), numbers, depth - 1) for _ in range(2)]
            if field.is_repeated:
                getattr(message, field.name).extend(parts)
            else:
                getattr(message, field.name).CopyFrom(parts[0])
        elif field.is_repeated:
            # crit takes a list of numbers for an address only if it is as long as one.
            count = 4 if field.GetOptions().Extensions[criu].ipadd else 3
            getattr(message, field.name).extend(_value(field, numbers) for _ in range(count))
        else:
            setattr(message, field.name, _value(field, numbers))
    return message


def _class_of(field: Any) -> type[Message]:
    cls: type[Message] = field.message_type._concrete_class
    return cls


def _value(field: Any, numbers: Iterator[int]) -> object:
    number = next(numbers)
    match field.type:
        case FieldDescriptor.TYPE_BOOL:
            return True
        case FieldDescriptor.TYPE_STRING:
            return f"text {number}"
        case FieldDescriptor.TYPE_BYTES:
            return b"\0\xff" + str(number).encode()
        case FieldDescriptor.TYPE_ENUM:
            return _enum_numbers(field.enum_type)[1]
    return number


def _enum_numbers(enum: Any) -> list[int]:
    return [value.number for value in enum.values]


@st.composite
def random_messages(draw: st.DrawFn, cls: type[Message], depth: int = _DEPTH) -> Message:
    """Random messages with all required fields."""
    message = cls()
    for field in message.DESCRIPTOR.fields:
        if field.is_repeated:
            count = draw(st.integers(0, 2)) if depth else 0
        else:
            count = int(field.is_required or (depth > 0 and draw(st.booleans())))
        for _ in range(count):
            if field.message_type is not None:
                part = draw(random_messages(_class_of(field), max(depth - 1, 0)))
                if field.is_repeated:
                    getattr(message, field.name).append(part)
                else:
                    getattr(message, field.name).CopyFrom(part)
            elif field.is_repeated:
                getattr(message, field.name).append(draw(_random_value(field)))
            else:
                setattr(message, field.name, draw(_random_value(field)))
    return message


def _random_value(field: Any) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.text(max_size=8)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=8)
    if field.type == FieldDescriptor.TYPE_ENUM:
        return st.sampled_from(_enum_numbers(field.enum_type))
    return st.integers(*_BITS[field.type])


@st.composite
def random_records(draw: st.DrawFn, name: str) -> list[Record]:
    """Random contents of an image."""
    image_type = catalog.lookup(name)
    records = []
    for index in range(draw(st.integers(1 if image_type.head else 0, 3))):
        message = draw(random_messages(image_type.message_class(index)))
        records.append((message, _fit(message, draw(st.binary(max_size=40)))))
    return _drop_impossible(records)


# Behind a ghost file without chunks comes its content, and nothing after that.
def _drop_impossible(records: list[Record]) -> list[Record]:
    first = records[0][0] if records else None
    if first and first.DESCRIPTOR.name == "ghost_file_entry" and not getattr(first, "chunks"):  # noqa: B009
        return records[:1]
    return records


def _fit(message: Any, data: bytes) -> bytes:
    """Sets the fields of the message that tell of the bytes behind it; returns those."""
    match message.DESCRIPTOR.name:
        case "pipe_data_entry":
            message.bytes = len(data)
        case "sk_packet_entry":
            message.length = len(data)
        case "tcp_stream_entry":
            message.inq_len, message.outq_len = len(data) // 3, len(data) - len(data) // 3
        case "bpfmap_data_entry":
            message.keys_bytes, message.values_bytes = len(data) // 3, len(data) - len(data) // 3
        case "ipc_sem_entry":
            message.nsems = len(data) // 2
            return data[: len(data) // 2 * 2] + b"\0" * (-(len(data) // 2 * 2) % 8)
        case "ipc_shm_entry":
            message.in_pagemaps = len(data) % 5 == 0
            message.size = len(data)
            return b"" if message.in_pagemaps else data + b"\0" * (-len(data) % 4)
        case "ipc_msg_entry":
            message.qnum = 2
            header = ipc_msg(mtype=len(data), msize=len(data)).SerializeToString()
            one = len(header).to_bytes(4, "little") + header + data + b"\0" * (-len(data) % 8)
            return one * 2
        case "ghost_chunk_entry":
            message.len = len(data)
        case "ghost_file_entry":
            return b"" if message.chunks else data
        case _:
            return b""
    return data
