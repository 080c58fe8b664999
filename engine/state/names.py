"""The name (comm) of each thread, as in `ps` and /proc/PID/comm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from google.protobuf.message import Message

from phaul.errors import ImageError
from phaul.images.pb.core_pb2 import core_entry

if TYPE_CHECKING:
    from phaul.engine.batch import Batch
    from phaul.engine.skeleton import SkeletonThread
    from phaul.engine.source import SourceThread

_PR_SET_NAME: Final = 15
_PR_GET_NAME: Final = 16
SIZE: Final = 16  # with its NUL (linux/sched.h)


def dump_thread(thread: SourceThread, call: Batch, core: core_entry) -> Iterator[None]:
    """Fills thread_core.comm, and tc.comm of a leader."""
    # /proc/PID/comm ends in a newline that may be part of a name.
    room = call.space(SIZE)
    call.prctl(_PR_GET_NAME, room)
    yield
    name = room.bytes().split(b"\0")[0]
    set_bytes(core.thread_core, "comm", name)
    if thread.tid == thread.process.pid:
        set_bytes(core.tc, "comm", name)


def restore_thread(thread: SkeletonThread, call: Batch, core: core_entry) -> None:
    """Sets the name; by each thread itself, as only that is allowed.

    Raises:
        ImageError: the name is too long.
    """
    holder = core.thread_core if core.thread_core.HasField("comm") else core.tc
    name = get_bytes(holder, "comm")
    if len(name) >= SIZE:
        raise ImageError(f"core-{thread.tid}: name of {len(name)} bytes")
    call.prctl(_PR_SET_NAME, name)


def set_bytes(message: Message, field: str, value: bytes) -> None:
    """Sets a string field to bytes that may not be UTF-8 (a name that was cut in the middle of a letter).

    CRIU puts the bytes there as they are. Protobuf reads such a field, but does not let us write it directly.
    """
    try:
        setattr(message, field, value.decode())
    except UnicodeDecodeError:
        number = message.DESCRIPTOR.fields_by_name[field].number
        # A tag of one byte (numbers up to 15), wire type 2; a length of one byte.
        message.MergeFromString(bytes((number << 3 | 2, len(value))) + value)


def get_bytes(message: Message, field: str) -> bytes:
    """A string field as bytes; see `set_bytes`."""
    value: str | bytes = getattr(message, field)
    return value.encode() if isinstance(value, str) else value
