"""What two machines must have in common: each side checks the other's Hello."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterable

import phaul
from phaul.errors import PeerError, VersionMismatch
from phaul.messages import PROTOCOL
from phaul.pb import control_pb2 as control

# Probed features (phaul.engine.kernel) without which a role cannot do its work.
SOURCE_NEEDS = ("pidfd_getfd", "kcmp", "map_files", "proc_children")
DESTINATION_NEEDS = ("clone3_set_tid", "map_files", "timens")

_ROLE_NAMES = {control.SOURCE: "source", control.DESTINATION: "destination"}


def hello(role: control.Role, token: bytes = b"", agent_id: bytes = b"") -> control.Hello:
    """Introduce this machine. Probes the kernel, and imports what a migration needs: tens of milliseconds.

    All that is else imported on demand would be so during the freeze.

    Args:
        role: of this side.
        token: of the migration.
        agent_id: of this start of the agent (destination).
    """
    from phaul.engine import kernel
    from phaul.engine.state.files.base import kinds
    from phaul.images import catalog

    catalog.load_all()
    kinds()
    system = os.uname()
    return control.Hello(
        phaul_version=phaul.__version__,
        protocol=PROTOCOL,
        role=role,
        arch=system.machine,
        page_size=resource.getpagesize(),
        kernel_release=system.release,
        features=kernel.features(),
        cpu_features=sorted(kernel.cpu_features()),
        vdso_id=kernel.vdso_id(),
        token=token,
        agent_id=agent_id,
    )


def check(source: control.Hello, destination: control.Hello) -> None:
    """Compare the two sides; the same answer at both.

    Raises:
        PeerError: one of them is not in the role it should have.
        VersionMismatch: they do not fit together; the text names both values.
    """
    for side, role in ((source, control.SOURCE), (destination, control.DESTINATION)):
        if side.role != role:
            raise PeerError(f"the {_ROLE_NAMES[role]} does not introduce itself as one")
    _equal("control protocol", source, destination, lambda side: str(side.protocol))
    _equal("architecture", source, destination, lambda side: side.arch)
    _equal("page size", source, destination, lambda side: str(side.page_size))
    _needs(source, SOURCE_NEEDS)
    _needs(destination, DESTINATION_NEEDS)
    # Programs look at the CPU once, when they start, and use what they saw from then on.
    missing = set(source.cpu_features) - set(destination.cpu_features)
    if missing:
        raise VersionMismatch(f"CPU features: the source has {_join(missing)}, the destination has not")
    # The vDSO keeps its address, and threads may hold return addresses into it.
    _equal(
        "vDSO",
        source,
        destination,
        lambda side: f"{side.vdso_id.hex()[:16]} (kernel {side.kernel_release})",
        lambda side: side.vdso_id,
    )


def _equal(
    what: str,
    source: control.Hello,
    destination: control.Hello,
    show: Callable[[control.Hello], str],
    key: Callable[[control.Hello], object] | None = None,
) -> None:
    key = key or show
    if key(source) != key(destination):
        raise VersionMismatch(f"{what}: {show(source)} at the source, {show(destination)} at the destination")


def _needs(side: control.Hello, needed: Iterable[str]) -> None:
    missing = [name for name in needed if not side.features.get(name, False)]
    if missing:
        raise VersionMismatch(
            f"the kernel of the {_ROLE_NAMES[side.role]} ({side.kernel_release}) lacks {_join(missing)}"
        )


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
