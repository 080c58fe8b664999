"""Regenerates `phaul/pb/` from `phaul/proto/`, as `phaul.images.generate` does: `python -m phaul.generate`."""

from __future__ import annotations

from pathlib import Path

from phaul.images import generate

# Roots the generated module at `phaul.pb`, and its name in the descriptor pool likewise.
VIRTUAL_ROOT = "phaul/pb"

HERE = Path(__file__).parent


def compile_schemas(output: Path) -> list[Path]:
    """See `phaul.images.generate.compile_schemas`."""
    return generate.compile_schemas(output, HERE, VIRTUAL_ROOT)


if __name__ == "__main__":
    generate.main(HERE, VIRTUAL_ROOT)
