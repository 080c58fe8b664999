"""What two machines must have in common."""

from __future__ import annotations

import pytest

from phaul.errors import PeerError, VersionMismatch
from phaul.handshake import check
from phaul.pb import control_pb2 as control
from tests.phaul.world import hello


def test_equal_machines_fit() -> None:
    check(hello(control.SOURCE), hello(control.DESTINATION))


def test_a_destination_may_have_more() -> None:
    there = hello(control.DESTINATION)
    there.cpu_features.append("avx512f")
    there.features["new"] = True
    there.phaul_version = there.kernel_release = "9.9"
    check(hello(control.SOURCE), there)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("protocol", 2, "control protocol: 1 at the source, 2 at the destination"),
        ("arch", "aarch64", "architecture: x86_64 at the source, aarch64 at the destination"),
        ("page_size", 65536, "page size: 4096 at the source, 65536 at the destination"),
        ("vdso_id", b"w" * 16, "vDSO: 7676767676767676 (kernel 6.18) at the source, 7777777777"),
    ],
)
def test_differences_are_named_with_both_values(field: str, value: object, says: str) -> None:
    there = hello(control.DESTINATION)
    setattr(there, field, value)
    with pytest.raises(VersionMismatch) as caught:
        check(hello(control.SOURCE), there)
    assert says in str(caught.value)


def test_cpu_features_of_the_source_must_be_there() -> None:
    here = hello(control.SOURCE)
    here.cpu_features.extend(["avx512f", "amx"])
    with pytest.raises(VersionMismatch, match="the source has amx, avx512f, the destination"):
        check(here, hello(control.DESTINATION))


@pytest.mark.parametrize(("side", "feature"), [("source", "pidfd_getfd"), ("destination", "clone3_set_tid")])
def test_each_role_needs_its_kernel_features(side: str, feature: str) -> None:
    sides = {"source": hello(control.SOURCE), "destination": hello(control.DESTINATION)}
    sides[side].features[feature] = False
    with pytest.raises(VersionMismatch, match=rf"the {side} \(6.18\) lacks {feature}"):
        check(**sides)


def test_two_sources_cannot_talk() -> None:
    with pytest.raises(PeerError, match="destination does not introduce itself as one"):
        check(hello(control.SOURCE), hello(control.SOURCE))
