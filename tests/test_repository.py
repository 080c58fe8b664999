"""The repository itself: layout, documents that must agree with the code, and what is shipped."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import phaul
from phaul import errors
from phaul.errors import PhaulError

ROOT = Path(__file__).resolve().parent.parent
SUBSYSTEMS = ("engine", "images", "lazy_pages", "pageserver", "transport")


def sources() -> list[Path]:
    """All files of the repository, tracked or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    names = sorted({os.fsdecode(name) for name in listed.stdout.split(b"\0") if name})
    found = [ROOT / name for name in names]
    return [path for path in found if path.is_symlink() or path.is_file()]


def error_classes(root: type[PhaulError] = PhaulError) -> Iterator[type[PhaulError]]:
    """`root` and all below it."""
    yield root
    for below in root.__subclasses__():
        yield from error_classes(below)


@pytest.mark.parametrize("name", SUBSYSTEMS)
def test_each_top_level_folder_is_linked_into_the_package(name: str) -> None:
    assert (ROOT / name / "__init__.py").is_file()
    assert os.readlink(ROOT / "phaul" / name) == f"../{name}"


def test_the_checkout_is_what_is_tested() -> None:
    assert phaul.__file__ is not None
    assert Path(phaul.__file__).resolve().parent == ROOT / "phaul"


def test_documented_exit_codes_are_those_of_the_classes() -> None:
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in (ROOT / "docs" / "errors.md").read_text().splitlines()
        if re.match(r"\| \d+ \|", line)
    ]
    classes = {
        (str(c.exit_code), c.__name__, (inspect.getdoc(c) or "").splitlines()[0], c.help_text or "-")
        for c in error_classes()
    }
    assert [row for row in rows if len(row) == 4] == sorted(classes, key=lambda row: int(row[0]))


def test_every_error_class_has_its_own_exit_code_and_advice() -> None:
    classes = list(error_classes())
    codes = [c.exit_code for c in classes]
    assert len(set(codes)) == len(codes)
    assert [c.__name__ for c in classes if not c.help_text] == ["PhaulError"]
    # 126 and up are the shell's.
    assert all(0 < code < 126 for code in codes)


def test_the_error_tree_is_drawn_whole() -> None:
    assert errors.__doc__ is not None
    drawn = set(re.findall(r"^ {4}[ |+-]*(\w+)", errors.__doc__, re.M))
    assert {c.__name__ for c in error_classes()} <= drawn


def test_no_path_of_somebodys_machine() -> None:
    homes = "|".join(("work", "root", "home"))
    pattern = re.compile(rf"(?<![\w.}}])/(?:{homes})/[\w.]|/tmp/venv|\.pyenv".encode())
    found = []
    for path in sources():
        if path.is_symlink() or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line!r}")
    assert found == []


def test_no_file_is_large_or_built() -> None:
    real = [path for path in sources() if not path.is_symlink()]
    assert [path for path in real if path.stat().st_size > 400_000] == []
    assert [path for path in real if path.suffix in (".so", ".o", ".pyc", ".whl")] == []


@pytest.mark.slow
def test_the_wheel_holds_each_file_once(tmp_path: Path) -> None:
    """Built from a copy: a build leaves folders behind."""
    copy = tmp_path / "copy"
    paths = sources()
    for path in paths:
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, copy],
        check=True,
        stdin=subprocess.DEVNULL,
    )

    (wheel,) = tmp_path.glob("phaul-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    code = {name for name in names if name.endswith((".py", ".pyi"))}
    folders = {"phaul": "phaul", **{name: f"phaul/{name}" for name in SUBSYSTEMS}}
    expected = {
        f"{folders[top]}/{path.relative_to(ROOT / top)}"
        for path in paths
        if (top := path.relative_to(ROOT).parts[0]) in folders and path.suffix in (".py", ".pyi")
    }
    assert code == expected
    assert [name for name in names if name.endswith(".so")] == ["phaul/engine/_native.abi3.so"]
    assert "phaul/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"phaul", f"phaul-{_version()}.dist-info"}


def _version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert found is not None
    return found[1]
