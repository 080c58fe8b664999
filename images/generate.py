"""Regenerates `images/pb/` from `images/proto/`: `python -m phaul.images.generate`.

The result is checked in, so that neither a build nor a checkout needs a protobuf compiler; a
test compares it with a fresh run. The compiler is pinned, since its version is part of what it
writes. It comes with the development dependencies (`grpcio-tools`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

# Where the schemas seem to lie for the compiler. It roots the generated imports at
# `phaul.images.pb`: no `core_pb2` appears at top level, and no file name in the descriptor pool
# is one of CRIU's.
VIRTUAL_ROOT = "phaul/images/pb"

COMPILER = "grpcio-tools"
COMPILER_VERSION = "1.85.1"

HERE = Path(__file__).parent


def compile_schemas(output: Path, package: Path = HERE, virtual_root: str = VIRTUAL_ROOT) -> list[Path]:
    """Compiles every schema; returns the `*_pb2.py` and `*_pb2.pyi` files below `output`.

    Args:
        package: the folder that has the schemas, in `proto/`.
        virtual_root: where they seem to lie for the compiler.

    Raises:
        RuntimeError: another version of the compiler is installed, or a schema is wrong (the
            compiler has printed why).
    """
    if (found := metadata.version(COMPILER)) != COMPILER_VERSION:
        raise RuntimeError(f"needs {COMPILER} {COMPILER_VERSION}, found {found}")
    schemas = sorted(path.name for path in (package / "proto").glob("*.proto"))
    status = subprocess.call(
        [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            f"-I{virtual_root}={package / 'proto'}",
            f"--python_out={output}",
            f"--pyi_out={output}",
            *(f"{virtual_root}/{name}" for name in schemas),
        ]
    )
    if status:
        raise RuntimeError(f"the protobuf compiler failed with status {status}")
    return sorted((output / virtual_root).iterdir())


def main(package: Path = HERE, virtual_root: str = VIRTUAL_ROOT) -> None:
    """Replaces the generated files of this checkout; arguments as in `compile_schemas`."""
    target = package / "pb"
    with tempfile.TemporaryDirectory() as scratch:
        generated = {path.name: path for path in compile_schemas(Path(scratch), package, virtual_root)}
        for name, path in generated.items():
            (target / name).write_bytes(path.read_bytes())
    for old in target.glob("*_pb2.py*"):
        if old.name not in generated:
            old.unlink()
    print(f"{len(generated)} files in {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
