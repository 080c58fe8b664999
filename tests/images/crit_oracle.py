"""Debian's `crit` as a second opinion about image files: written by others, from CRIU's schemas.

Debian 12 has crit 3.17.1: it knows most kinds of images of CRIU 4.2, but not the newest fields.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

CRIT = ("/usr/bin/python3", "/usr/bin/crit")


def crit_decode(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of an image file as crit reads them.

    Field values are plain numbers; enums are names, bytes are base64, and the bytes behind a
    message are under "extra".

    Raises:
        AssertionError: crit does not take the file; the text is what it said.
    """
    entries: list[dict[str, Any]] = json.loads(_crit("decode", "-i", str(path)))["entries"]
    return entries


def crit_rewrite(path: Path, target: Path) -> None:
    """Has crit read an image file and write what it understood as another image file.

    Raises:
        AssertionError: as in `crit_decode`.
    """
    decoded = target.with_name(f"{target.name}.json")
    decoded.write_text(_crit("decode", "-i", str(path)))
    _crit("encode", "-i", str(decoded), "-o", str(target))


def _crit(*arguments: str) -> str:
    # Without the variables of the virtual environment: crit belongs to the system's Python.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([*CRIT, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"crit {' '.join(arguments)}: {done.stderr}"
    return done.stdout
