"""Regenerates `phaul/pb/` from `phaul/proto/`: `python -m phaul.generate`.

Done as in `phaul.images.generate`, with the same pinned compiler: the result is checked in, and a
test compares it with a fresh run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from phaul.images.generate import COMPILER, COMPILER_VERSION

# Roots the generated module at `phaul.pb` and its name in the descriptor pool likewise.
VIRTUAL_ROOT = "phaul/pb"

HERE = Path(__file__).parent


def compile_schemas(output: Path) -> list[Path]:
    """Compiles every schema; returns the `*_pb2.py` and `*_pb2.pyi` files below `output`.

    Raises:
        RuntimeError: another version of the compiler is installed, or a schema is wrong (the
            compiler has printed why).
    """
    if (found := metadata.version(COMPILER)) != COMPILER_VERSION:
        raise RuntimeError(f"needs {COMPILER} {COMPILER_VERSION}, found {found}")
    schemas = sorted(path.name for path in (HERE / "proto").glob("*.proto"))
    status = subprocess.call(
        [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            f"-I{VIRTUAL_ROOT}={HERE / 'proto'}",
            f"--python_out={output}",
            f"--pyi_out={output}",
            *(f"{VIRTUAL_ROOT}/{name}" for name in schemas),
        ]
    )
    if status:
        raise RuntimeError(f"the protobuf compiler failed with status {status}")
    return sorted((output / VIRTUAL_ROOT).iterdir())


def main() -> None:
    """Replaces the generated files of this checkout."""
    target = HERE / "pb"
    with tempfile.TemporaryDirectory() as scratch:
        for path in compile_schemas(Path(scratch)):
            (target / path.name).write_bytes(path.read_bytes())
            print(target / path.name, file=sys.stderr)


if __name__ == "__main__":
    main()
