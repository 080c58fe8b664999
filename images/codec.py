"""Image files as bytes: magic, then records of `u32 size | message [| extra bytes]`.

    offset  size  field
    0       4     0x54564319 (service files: 0x55105940; inventory: this word is missing)
    4       4     magic of the type
    8       4     size of the message
    12      size  message (protobuf)
    ...     n     bytes that belong to the message, if the type has such (`catalog`)
    ...           next record

All numbers are little-endian. The same bytes lie in a file and travel on the wire. Whatever is
read is hostile: a length is compared with what is there before anything is made of it, so that
no input allocates more than a small multiple of its own size, and the only exception is
ImageError, which names the file and the offset.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import DecodeError, Message

from phaul.errors import ImageError
from phaul.images.catalog import Frame, ImageType, file_name, lookup
from phaul.images.extra import U32

Record = tuple[Message, bytes]
"""A message and the bytes behind it (empty for most types)."""

MAX_IMAGE_SIZE = 1 << 30
"""Upper bound of one image file in bytes. Page contents are not in such files."""


def _magic_words(image_type: ImageType) -> tuple[int, ...]:
    if image_type.frame is Frame.BARE:
        return (image_type.magic,)
    return (image_type.frame.value, image_type.magic)


def encode(name: str, records: Iterable[Record]) -> bytes:
    """Returns the image file with these records.

    Raises:
        ImageError: the name is no kind of image, a message is of the wrong type or incomplete,
            or the extra bytes are not as many as the message says.
    """
    image_type, file = lookup(name), file_name(name)
    parts = [U32.pack(word) for word in _magic_words(image_type)]
    for index, (message, extra) in enumerate(records):
        if (fault := _fault(image_type, index, message, extra)) is not None:
            raise ImageError(f"{file}: record {index}: {fault}")
        body = message.SerializeToString()
        parts += (U32.pack(len(body)), body, extra)
    return b"".join(parts)


def _fault(image_type: ImageType, index: int, message: Message, extra: bytes) -> str | None:
    expected = image_type.message_class(index)
    if not isinstance(message, expected):
        return f"{message.DESCRIPTOR.name} where {expected.DESCRIPTOR.name} belongs"
    if not message.IsInitialized():
        return f"{expected.DESCRIPTOR.name} lacks {_missing(message)}"
    if len(extra) != (length := _extra_length(image_type, message, memoryview(extra))):
        return f"{len(extra)} bytes follow, the message tells of {length}"
    return None


def _extra_length(image_type: ImageType, message: Message, rest: memoryview) -> int:
    return image_type.extra_length(message, rest) if image_type.extra_length else 0


def decode(name: str, data: bytes) -> list[Record]:
    """Returns the records of an image file.

    Raises:
        ImageError: the name is no kind of image, or the content is not one of this kind.
    """
    image_type = lookup(name)
    reader = _Reader(file_name(name), data)
    for word in _magic_words(image_type):
        offset = reader.offset
        if (found := reader.u32("magic")) != word:
            raise reader.error(offset, f"magic 0x{found:08x} where 0x{word:08x} belongs")
    records: list[Record] = []
    while reader.rest:
        cls = image_type.message_class(len(records))
        size = reader.u32("message size")
        offset = reader.offset
        message = _parse(reader, cls, reader.take(size, cls.DESCRIPTOR.name), offset)
        length = _extra_length(image_type, message, reader.rest)
        records.append((message, reader.take(length, f"bytes of {cls.DESCRIPTOR.name}")))
    if image_type.head and not records:
        raise reader.error(reader.offset, f"truncated: no {image_type.message_class(0).__name__}")
    return records


def _parse(reader: _Reader, cls: type[Message], body: bytes, offset: int) -> Message:
    try:
        message = cls.FromString(body)
    except DecodeError:
        raise reader.error(offset, f"this is no {cls.DESCRIPTOR.name}") from None
    if not message.IsInitialized():
        raise reader.error(offset, f"{cls.DESCRIPTOR.name} lacks {_missing(message)}")
    return message


def _missing(message: Message) -> str:
    # The type stubs do not know this method.
    return ", ".join(message.FindInitializationErrors())  # type: ignore[attr-defined]


class _Reader:
    """A cursor over one file. Every error names the file and the offset."""

    def __init__(self, file: str, data: bytes) -> None:
        self.file = file
        self.offset = 0
        self.rest = memoryview(data)

    def take(self, length: int, what: str) -> bytes:
        if length > len(self.rest):
            left = len(self.rest)
            raise self.error(self.offset, f"truncated: {what} takes {length} bytes, {left} are left")
        taken = bytes(self.rest[:length])
        self.offset += length
        self.rest = self.rest[length:]
        return taken

    def u32(self, what: str) -> int:
        value: int
        (value,) = U32.unpack(self.take(U32.size, what))
        return value

    def error(self, offset: int, what: str) -> ImageError:
        return ImageError(f"{self.file}: offset {offset}: {what}")
