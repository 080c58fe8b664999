"""The envelope, and what a peer may put in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaul import generate
from phaul.errors import CannotMove, ImageError, PeerError, PhaulError, RestoreError
from phaul.messages import (
    IMAGE_PIECE,
    MAX_MESSAGE,
    ImageCollector,
    decode,
    encode,
    error_from,
    failed,
    image_pieces,
)
from phaul.pb import control_pb2 as control

NAMES = [field.message_type.name for field in control.Message.DESCRIPTOR.fields if field.message_type]


@pytest.mark.parametrize("name", NAMES)
def test_every_message_survives_its_envelope_also_empty(name: str) -> None:
    payload = getattr(control, name)()
    assert decode(encode(payload)) == payload
    assert type(decode(encode(payload))) is type(payload)


@given(st.binary(max_size=200))
def test_garbage_is_a_message_or_refused(data: bytes) -> None:
    try:
        decode(data)
    except PeerError:
        return


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff", b"\xa2\x06\x00"])
def test_what_is_no_message(data: bytes) -> None:
    with pytest.raises(PeerError, match="control message"):
        decode(data)


def test_errors_travel() -> None:
    back = error_from(failed(ImageError("core-1: truncated")), "destination")
    assert type(back) is ImageError
    assert str(back) == "destination: core-1: truncated"


@pytest.mark.parametrize(
    ("message", "becomes"),
    [
        (control.Failed(exit_code=1, text="x"), PhaulError),
        (control.Failed(exit_code=CannotMove.exit_code, text="x"), RestoreError),
        (control.Failed(exit_code=12345, text="x"), RestoreError),
    ],
)
def test_unknown_exit_codes(message: control.Failed, becomes: type[PhaulError]) -> None:
    assert type(error_from(message, "destination")) is becomes


def test_an_error_from_outside_is_one_line() -> None:
    assert str(error_from(control.Failed(text="a\n\x0bb\n"), "destination")) == "destination: a b"


@pytest.mark.parametrize("size", [0, 1, IMAGE_PIECE - 1, IMAGE_PIECE, IMAGE_PIECE + 1, 3 << 20])
def test_images_come_back_from_their_pieces(size: int) -> None:
    data = bytes(index % 255 for index in range(size))
    collector = ImageCollector()
    for piece in [*image_pieces("core-1", data), *image_pieces("mm-1", b"x")]:
        assert len(encode(piece)) <= MAX_MESSAGE
        collector.add(piece)
    assert collector.finish() == {"core-1": data, "mm-1": b"x"}


def piece(name: str, data: bytes = b"", last: bool = False) -> control.ImageFile:
    return control.ImageFile(name=name, data=data, last=last)


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([piece("a"), piece("b")], "image 'b' comes out of order"),
        ([piece("a", last=True), piece("a")], "image 'a' comes out of order"),
        ([piece("")], "image '' comes out of order"),
        ([piece("a", bytes(2000))], "exceed 1000 bytes"),
        ([piece(f"a{number}", last=True) for number in range(100)], "exceed 1000 bytes"),
    ],
)
def test_images_that_do_not_add_up(pieces: list[control.ImageFile], says: str) -> None:
    collector = ImageCollector(limit=1000)

    def add_all() -> None:
        for each in pieces:
            collector.add(each)

    with pytest.raises(PeerError, match=says):
        add_all()


def test_an_incomplete_image() -> None:
    collector = ImageCollector()
    collector.add(piece("a", b"half"))
    with pytest.raises(PeerError, match="image 'a' is not complete"):
        collector.finish()


def test_generated_code_is_that_of_the_schema(tmp_path: Path) -> None:
    fresh = generate.compile_schemas(tmp_path)
    assert fresh
    for path in fresh:
        assert (generate.HERE / "pb" / path.name).read_bytes() == path.read_bytes()
