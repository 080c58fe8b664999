"""Image sets: the metadata of a dumped tree, in memory and in a directory.

Page contents are never in an `ImageSet`. They lie beside it, in `pages-N.img` or in a stream,
and page maps (`phaul.images.pagemap`) tell which they are.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, overload

from google.protobuf.message import Message

from phaul.errors import DumpError, ImageError
from phaul.images import catalog, codec
from phaul.images.codec import Record

M = TypeVar("M", bound=Message)

INVENTORY = "inventory"
"""The image that makes a directory an image set: written last, removed first."""


class ImageSet:
    """Images by name, each a list of records (message, extra bytes).

    A name is the file name without `.img`: "pstree", "core-123", "pipes-data". Names and
    message types are checked against `catalog` when they come in.
    """

    def __init__(self) -> None:
        self._images: dict[str, list[Record]] = {}

    def __repr__(self) -> str:
        return f"<ImageSet of {len(self._images)} images>"

    def add(self, name: str, message: Message, extra: bytes = b"") -> None:
        """Appends a record to an image, which is made if it is not there.

        The message is kept, not copied, and may be filled in later: that it is complete, and
        that `extra` is as long as it says, is checked by `encode_file`.

        Raises:
            ImageError: no image has this name, or its records are of another type.
        """
        image_type = catalog.lookup(name)
        records = self._images.get(name, [])
        expected = image_type.message_class(len(records))
        if not isinstance(message, expected):
            found = message.DESCRIPTOR.name
            raise ImageError(f"{name}: {found} where {expected.DESCRIPTOR.name} belongs")
        records.append((message, extra))
        self._images[name] = records

    def names(self) -> list[str]:
        """Returns the names of the images, in the order in which they came in."""
        return list(self._images)

    def records(self, name: str) -> list[Record]:
        """Returns the records of an image; none if it is not there."""
        return list(self._images.get(name, ()))

    @overload
    def messages(self, name: str) -> list[Message]: ...
    @overload
    def messages(self, name: str, cls: type[M]) -> list[M]: ...
    def messages(self, name: str, cls: type[M] | None = None) -> list[M] | list[Message]:
        """Returns the messages of an image; none if it is not there.

        With `cls` only those of this type, which matters for the images that begin with
        another one (page maps, ghost files).
        """
        messages = [message for message, _ in self._images.get(name, ())]
        if cls is None:
            return messages
        return [message for message in messages if isinstance(message, cls)]

    def one(self, name: str, cls: type[M]) -> M:
        """Returns the only message of an image.

        Raises:
            ImageError: the image is missing, or has another number or type of messages.
        """
        records = self._images.get(name)
        if records is None:
            raise ImageError(f"image {name} is missing")
        if len(records) != 1 or not isinstance(message := records[0][0], cls):
            raise ImageError(f"image {name} has {len(records)} records where one {cls.__name__} belongs")
        return message

    def encode_file(self, name: str) -> bytes:
        """Returns an image as its file has it, which is also how it travels.

        Raises:
            ImageError: the image is missing, or a record of it is incomplete.
        """
        if name not in self._images:
            raise ImageError(f"image {name} is missing")
        return codec.encode(name, self._images[name])

    def decode_file(self, name: str, data: bytes) -> None:
        """Adds an image that `encode_file` made, or that was read from a file.

        Raises:
            ImageError: the content is not such an image, or the set has one of this name. The
                set is then as it was.
        """
        if name in self._images:
            raise ImageError(f"image {name} comes twice")
        self._images[name] = codec.decode(name, data)


def begin_directory(path: Path) -> None:
    """Makes sure that the directory does not look like a whole image set.

    To be called before anything (pages, say) is written into a directory that may hold an
    older set; `write_directory` does it too.

    Raises:
        DumpError: the directory cannot be written to.
    """
    try:
        if not path.is_dir():
            raise NotADirectoryError(20, "not a directory")
        path.joinpath(catalog.file_name(INVENTORY)).unlink(missing_ok=True)
    except OSError as error:
        raise DumpError(f"cannot write images to {path}: {error.strerror}") from error


def write_directory(images: ImageSet, path: Path) -> None:
    """Writes all images as files into an existing directory; files of those names are replaced.

    `inventory.img` appears last, by a rename: until then the directory is not an image set.
    Nothing is synced to the disk.

    Raises:
        DumpError: a file cannot be written (full disk, permissions). All files that were
            written are removed again.
        ImageError: the set has no inventory, or a record is incomplete; nothing is left either.
    """
    if INVENTORY not in images.names():
        raise ImageError(f"image {INVENTORY} is missing")
    begin_directory(path)
    written: list[Path] = []
    try:
        for name in _inventory_last(images.names()):
            target = path / catalog.file_name(name)
            place = target.with_name(f"{target.name}.part") if name == INVENTORY else target
            written.append(place)
            _write_file(place, images.encode_file(name))
            if place != target:
                place.rename(target)
    except BaseException as error:
        for file in written:
            with suppress(OSError):
                file.unlink()
        if isinstance(error, OSError):
            raise DumpError(f"cannot write {place}: {error.strerror}") from error
        raise


def _inventory_last(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: name == INVENTORY)


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "wb", buffering=0, opener=_open_private) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]


# What a process holds may be secret: nobody but the owner reads what is made of it.
def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def read_directory(path: Path) -> ImageSet:
    """Reads all images of a directory, but not the raw ones (pages, tar files, ...).

    Files that are not images (logs) are passed over. A file that is named as an image but is
    of no known kind is an error: what cannot be read cannot be restored either.

    Raises:
        ImageError: the directory holds no image set, or an image is unreadable or damaged.
    """
    images = ImageSet()
    try:
        files = sorted(entry.name for entry in os.scandir(path))
    except OSError as error:
        raise ImageError(f"cannot read images from {path}: {error.strerror}") from error
    if catalog.file_name(INVENTORY) not in files:
        raise ImageError(f"{path} holds no image set: inventory.img is missing")
    for file in files:
        name = catalog.image_name(file)
        if name is not None and not catalog.is_raw(name):
            catalog.lookup(name)
            images.decode_file(name, _read_file(path / file))
    return images


def _read_file(path: Path) -> bytes:
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{path} is not a regular file")
            if status.st_size > codec.MAX_IMAGE_SIZE:
                raise ImageError(f"{path} has {status.st_size} bytes, too many for an image")
            return file.read(status.st_size)
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error


# What is named as an image may be a pipe without a writer.
def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
