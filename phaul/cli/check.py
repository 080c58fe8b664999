"""`phaul check`: show what this kernel can do."""

from __future__ import annotations

import argparse

from phaul.cli import criu_syntax
from phaul.cli.common import require_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    criu_syntax.add_arguments(parser, "check")


def run(args: argparse.Namespace) -> int:
    """Print the probed features; 0 if trees can be moved from and to here, else 1."""
    import json
    import os

    from phaul.engine import kernel
    from phaul.handshake import DESTINATION_NEEDS, SOURCE_NEEDS

    if args.feature:
        return _check_feature(args.feature)
    require_root("phaul check")
    features = kernel.features()
    missing = [n for n in (*SOURCE_NEEDS, *DESTINATION_NEEDS) if not features.get(n, False)]
    if args.json:
        print(json.dumps({"kernel": os.uname().release, "features": features, "enough": not missing}))
        return 1 if missing else 0
    for name, there in sorted(features.items()):
        needed = name in SOURCE_NEEDS or name in DESTINATION_NEEDS
        print(f"{name:<24} {'yes' if there else 'no':<4}{'needed' if needed else ''}".rstrip())
    if missing:
        print(f"\nThis kernel ({os.uname().release}) lacks {', '.join(missing)}.")
    return 1 if missing else 0


def _check_feature(name: str) -> int:
    """One feature by CRIU's name: 0 if it is there, else 1."""
    from phaul.engine.kernel_features import FEATURES, has
    from phaul.errors import UsageError

    if name == "list":
        print(" ".join(FEATURES))
        return 0
    if name not in FEATURES:
        raise UsageError(f"there is no feature {name} (see `phaul check --feature list`)")
    require_root("phaul check")
    there = has(name)
    print(f"{name}: {'yes' if there else 'no'}")
    return 0 if there else 1
