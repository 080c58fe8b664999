"""Names of unix sockets in the file system, which appear when the tree runs. Not a kind of file.

bind(2) keeps the name as it was given, and fails where something is. But the node of the source's socket may be there
(a file system that both hosts see), and has to stay until the source is gone. So a socket is bound in a root
directory of its own, where nothing but the path to the name exists, and its node is moved to where it belongs when
the tree runs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable
from typing import Final

from phaul.engine import native
from phaul.engine.sockdiag import unix_sockets
from phaul.engine.state.files.base import FileBuild
from phaul.images.pb.sk_unix_pb2 import file_perms_entry

CLONE_FS: Final = 0x200
_PREFIX: Final = ".phaul-"


class StagedName:
    """The node of a socket that is not yet where it belongs.

    Attributes:
        place: where that is.
        node: an O_PATH descriptor, by which one can connect (/proc/self/fd/N). Closed with `build`.
    """

    def __init__(self, build: FileBuild, name: bytes, directory: str, *, keep: bool) -> None:
        """Prepare a place to bind `name` at.

        Args:
            directory: the working directory of whoever had bound it.
            keep: the node is wanted; else it had been removed.

        Raises:
            OSError: EADDRINUSE, the name is in use on this host; or its directory is missing.
        """
        self.build, self._name, self._directory, self._keep = build, os.fsdecode(name), directory or "/", keep
        self.place = build.path(os.path.join(self._directory, self._name))
        self.node = -1
        if keep:
            _check_free(self.place)
        self._root = tempfile.mkdtemp(prefix=_PREFIX, dir=os.path.dirname(self.place) if keep else None)
        build.on_abort(self._remove)

    def bind(self, bind: Callable[[bytes], object], permissions: file_perms_entry) -> None:
        """Call `bind` with the name. The node gets permissions and owner; an unwanted one only `address` leads to."""
        name, path = os.fsencode(self._name), self._staged()
        _in_root(self._root, self._directory, os.path.dirname(self._name), lambda: bind(name))
        os.chown(path, permissions.uid, permissions.gid)
        os.chmod(path, stat.S_IMODE(permissions.mode))
        self.node = self.build.keep_until_close(os.open(path, os.O_PATH | os.O_CLOEXEC))
        if self._keep:
            self.build.on_resume(self._move)
        else:
            self._remove()

    @property
    def address(self) -> str:
        """A path that leads to the node, for connect(2)."""
        return f"/proc/self/fd/{self.node}"

    def _staged(self) -> str:
        # As the kernel resolved it in that root, where no ".." leads out.
        return self._root + os.path.normpath(os.path.join("/", self._directory, self._name))

    def _move(self) -> None:
        os.rename(self._staged(), self.place)
        self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


def _check_free(path: str) -> None:
    """Refuse a name that a socket of our network namespace has, or that is no socket's.

    A dead process may have left a node, or the source is bound to it through a file system that both hosts see.
    Whether somebody listens must not be tried out by connecting: that would leave a connection in a frozen listener.
    """
    with contextlib.suppress(FileNotFoundError):
        node = os.lstat(path)
        held = {found.vfs_inode for found in unix_sockets().values()}
        if not stat.S_ISSOCK(node.st_mode) or node.st_ino & 0xFFFFFFFF in held:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _in_root(root: str, directory: str, below: str, call: Callable[[], object]) -> None:
    """Make a call with another root and working directory, both of which no other thread sees."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            native.syscall("unshare", CLONE_FS)
            os.chroot(root)
            os.makedirs(directory, exist_ok=True)
            os.chdir(directory)
            if below:
                os.makedirs(below, exist_ok=True)
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
