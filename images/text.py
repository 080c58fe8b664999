"""Names that need not be UTF-8, in fields that protobuf calls strings.

A path or a thread's name is any bytes to Linux, and to CRIU. The Python runtime of protobuf
takes only valid UTF-8 for a `string` field, but it parses any bytes and then gives the field as
`bytes` instead of `str`. These two functions hide that: names are bytes on both ways.
"""

from __future__ import annotations

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_LENGTH_DELIMITED = 2


def get_bytes(message: Message, field: str) -> bytes:
    """Returns a string field as the bytes that it has on the wire."""
    value: str | bytes = getattr(message, field)
    return value.encode() if isinstance(value, str) else value


def put_bytes(message: Message, field: str, value: bytes) -> None:
    """Sets a string field to any bytes.

    Raises:
        ValueError: the message has no such string field, or it is a repeated one.
    """
    descriptor = message.DESCRIPTOR.fields_by_name.get(field)
    if descriptor is None or descriptor.type != FieldDescriptor.TYPE_STRING or descriptor.is_repeated:
        raise ValueError(f"{message.DESCRIPTOR.name} has no string field {field}")
    tag = _varint(descriptor.number << 3 | _LENGTH_DELIMITED)
    message.ClearField(field)
    message.MergeFromString(tag + _varint(len(value)) + value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
