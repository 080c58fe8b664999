"""Control messages as bytes and back: the only place that knows the envelope.

`phaul/proto/control.proto` says what each message means, `docs/formats.md` their order.
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import DecodeError

from phaul.errors import CannotMove, PeerError, PhaulError, RestoreError
from phaul.pb import control_pb2 as control

# Both must be equal on both sides. Raised whenever an older peer would misunderstand us.
PROTOCOL = 1
# Name of the WebSocket subprotocol: an HTTP server that does not know it is no agent.
SUBPROTOCOL = "phaul-migrate"

IMAGE_PIECE = 1 << 20
# Bounds on what a peer may make us hold. One piece and its envelope; all images of one tree.
MAX_MESSAGE = IMAGE_PIECE + (64 << 10)
MAX_IMAGES = 512 << 20

Payload = (
    control.Hello
    | control.Preflight
    | control.PreflightReply
    | control.ImageFile
    | control.Stage
    | control.Staged
    | control.PagesDone
    | control.Finish
    | control.Prepared
    | control.Commit
    | control.Running
    | control.Abort
    | control.Failed
)

# Message name -> field of the envelope.
_FIELDS = {
    field.message_type.name: field.name for field in control.Message.DESCRIPTOR.fields if field.message_type is not None
}


def encode(payload: Payload) -> bytes:
    """Put a message into its envelope."""
    message = control.Message()
    inner = getattr(message, _FIELDS[payload.DESCRIPTOR.name])
    inner.CopyFrom(payload)
    inner.SetInParent()  # a message without fields is there too
    return message.SerializeToString()


def decode(data: bytes) -> Payload:
    """Take a message out of its envelope.

    Raises:
        PeerError: not an envelope, or a message that this version does not know.
    """
    try:
        message = control.Message.FromString(data)
    except DecodeError as error:
        raise PeerError("the other side sent something that is no control message") from error
    name = message.WhichOneof("payload")
    if name is None:
        raise PeerError("the other side sent a control message that is unknown here")
    payload: Payload = getattr(message, name)
    return payload


def failed(error: BaseException) -> control.Failed:
    """What to tell the other side about an error here."""
    if isinstance(error, PhaulError):
        return control.Failed(exit_code=error.exit_code, text=str(error))
    return control.Failed(exit_code=PhaulError.exit_code, text=f"{error!r}")


def error_from(message: control.Failed, side: str) -> PhaulError:
    """The error that the other side has reported, as if it were ours.

    Args:
        message: as received.
        side: who sent it, for the text ("destination").
    """
    known = {cls.exit_code: cls for cls in _and_subclasses(PhaulError)}
    # CannotMove is about our own tree and has fields; nobody else can raise it for us.
    del known[CannotMove.exit_code]
    cls = known.get(message.exit_code, RestoreError)
    return cls(f"{side}: {' '.join(message.text.split())}")


def _and_subclasses(cls: type[PhaulError]) -> Iterator[type[PhaulError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _and_subclasses(sub)


def image_pieces(name: str, data: bytes) -> list[control.ImageFile]:
    """Cut an image file into messages of at most IMAGE_PIECE bytes of data."""
    offsets = range(0, max(len(data), 1), IMAGE_PIECE)
    return [
        control.ImageFile(
            name=name,
            data=data[offset : offset + IMAGE_PIECE],
            last=offset + IMAGE_PIECE >= len(data),
        )
        for offset in offsets
    ]


class ImageCollector:
    """Puts pieces of images together again, within bounds.

    Attributes:
        files: complete images: name -> contents of the .img file.
    """

    def __init__(self, limit: int = MAX_IMAGES) -> None:
        self.files: dict[str, bytes] = {}
        self._limit = limit
        self._total = 0
        self._name: str | None = None
        self._pieces: list[bytes] = []

    def add(self, piece: control.ImageFile) -> None:
        """Take the next piece.

        Raises:
            PeerError: it does not continue the image at hand, is one too many, or all images
                together exceed the limit.
        """
        if self._name is None and piece.name not in self.files and piece.name:
            self._name = piece.name
        if piece.name != self._name:
            raise PeerError(f"image {piece.name!r} comes out of order")
        # An empty piece costs memory, too.
        self._total += len(piece.data) + len(piece.name) + 64
        if self._total > self._limit:
            raise PeerError(f"the images exceed {self._limit} bytes")
        self._pieces.append(piece.data)
        if piece.last:
            self.files[piece.name] = b"".join(self._pieces)
            self._name, self._pieces = None, []

    def finish(self) -> dict[str, bytes]:
        """All images.

        Raises:
            PeerError: the last one is not complete.
        """
        if self._name is not None:
            raise PeerError(f"image {self._name!r} is not complete")
        return self.files
