"""How many bytes behind a message belong to it, for the images that mix messages and bytes.

Each function takes a message and all that follows it in the image, and returns the length. It
never allocates and never reads past the end: a length beyond what is there is returned as it
is, and the caller reports a truncated image. Source: CRIU 4.2, the dump and restore functions
of each kind.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, cast

from google.protobuf.message import DecodeError, Message

if TYPE_CHECKING:
    from phaul.images.pb.bpfmap_data_pb2 import bpfmap_data_entry
    from phaul.images.pb.ghost_file_pb2 import ghost_chunk_entry, ghost_file_entry
    from phaul.images.pb.ipc_msg_pb2 import ipc_msg_entry
    from phaul.images.pb.ipc_sem_pb2 import ipc_sem_entry
    from phaul.images.pb.ipc_shm_pb2 import ipc_shm_entry
    from phaul.images.pb.pipe_data_pb2 import pipe_data_entry
    from phaul.images.pb.sk_packet_pb2 import sk_packet_entry
    from phaul.images.pb.tcp_stream_pb2 import tcp_stream_entry

U32 = struct.Struct("<I")


def _round_up(length: int, to: int) -> int:
    return (length + to - 1) // to * to


def pipe_data(message: Message, rest: memoryview) -> int:
    """The content of a pipe."""
    return cast("pipe_data_entry", message).bytes


def sk_queues(message: Message, rest: memoryview) -> int:
    """One packet."""
    return cast("sk_packet_entry", message).length


def tcp_stream(message: Message, rest: memoryview) -> int:
    """The receive queue, then the send queue."""
    entry = cast("tcp_stream_entry", message)
    return entry.inq_len + entry.outq_len


def bpfmap_data(message: Message, rest: memoryview) -> int:
    """All keys, then all values."""
    entry = cast("bpfmap_data_entry", message)
    return entry.keys_bytes + entry.values_bytes


def ipc_sem(message: Message, rest: memoryview) -> int:
    """A u16 for each semaphore, padded to 8 bytes."""
    return _round_up(2 * cast("ipc_sem_entry", message).nsems, 8)


def ipc_shm(message: Message, rest: memoryview) -> int:
    """The segment's bytes, padded to 4; nothing when it is in a page map."""
    entry = cast("ipc_shm_entry", message)
    return 0 if entry.in_pagemaps else _round_up(entry.size, 4)


def ipc_msg(message: Message, rest: memoryview) -> int:
    """For each queued message: u32 size, `ipc_msg` of that size, text padded to 8 bytes."""
    from phaul.images.pb.ipc_msg_pb2 import ipc_msg as header

    end = 0
    for _ in range(cast("ipc_msg_entry", message).qnum):
        if end + U32.size > len(rest):
            return end + U32.size
        size: int = U32.unpack_from(rest, end)[0]
        end += U32.size + size
        if end > len(rest):
            return end
        try:
            message_header = header.FromString(bytes(rest[end - size : end]))
        except DecodeError:
            # Nobody can tell where the next one begins: more than there is, for the caller.
            return len(rest) + 1
        end += _round_up(message_header.msize, 8)
    return end


def ghost_file(message: Message, rest: memoryview) -> int:
    """A chunk's bytes; behind the file entry nothing if chunks follow, else the whole rest."""
    if message.DESCRIPTOR.name == "ghost_chunk_entry":
        return cast("ghost_chunk_entry", message).len
    return 0 if cast("ghost_file_entry", message).chunks else len(rest)
