"""The command line as CRIU reads it: getopt_long(3), --no- forms, configuration files.

`canonical` rewrites it to what the parser of a command takes: one word an option, `--name` or `--name=value`. So
argparse never sees what it has no notion of: `-v4`, `-verbosity=0`, `-RD/tmp`, doubled and reversed flags,
abbreviations.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from phaul.cli.criu_options import OPTIONS, Option
from phaul.errors import UsageError

SYSTEM_CONFIG = "/etc/criu/default.conf"
_BY_NAME = {option.name: option for option in OPTIONS}
_BY_LETTER = {option.short: option for option in OPTIONS if option.short}

Setting = tuple[Option, str | None]
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
OFF = "\0off"  # the value of a flag in its --no- form


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Declare the options that a command does."""
    for option in OPTIONS:
        if command not in option.does:
            continue
        names = [f"-{option.short}"] * bool(option.short) + [f"--{option.name}"]
        if option.takes_value:
            parser.add_argument(
                *names,
                metavar=option.value.strip("[]"),
                action="append" if "repeated" in option.help else "store",
                type=int if option.value in ("PID", "FD") else str,
                help=option.help,
            )
        else:
            parser.add_argument(*names, action="store_true", help=option.help)


def canonical(command: str, words: Sequence[str]) -> list[str]:
    """Rewrite the words behind a command's name.

    Options of phaul's own, and what is no option, stay as they are.

    Raises:
        UsageError: CRIU knows the option, phaul does not do it; a value is missing; a configuration file cannot be
        read.
    """
    rest: list[str] = []
    given = list(_settings(words, rest))
    values: dict[str, list[str]] = {}
    flags: dict[str, bool] = {}
    for option, value in [*_configured(given), *given]:
        if option.takes_value:
            values.setdefault(option.name, []).append(value or "")
        else:
            flags[option.name] = value != OFF
    for name in (*values, *(name for name, on in flags.items() if on)):
        _refuse(command, _BY_NAME[name], values.get(name, []))
    done = {option.name for option in OPTIONS if command in option.does}
    return [
        *(f"--{name}={value}" for name in values if name in done for value in values[name]),
        *(f"--{name}" for name, on in flags.items() if on and name in done),
        *rest,
    ]


def _refuse(command: str, option: Option, values: list[str]) -> None:
    if command in option.refuses and not (values and set(values) <= set(option.accepts)):
        shown = " ".join([f"--{option.name}", *values[-1:]]).strip()
        raise UsageError(f"phaul does not do {shown} yet")


def _settings(words: Sequence[str], rest: list[str]) -> Iterator[Setting]:
    """Options of CRIU among the words, in order; all else goes to `rest`."""
    left = iter(words)
    for word in left:
        if word == "--":
            rest.extend([word, *left])
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            option, on = _lookup(name)
            if option is None:
                rest.append(word)
            elif not option.takes_value:
                yield option, None if on else OFF
            elif equals or option.value_is_optional:
                yield option, value
            else:
                yield option, _next(left, f"--{option.name}")
        elif len(word) > 1 and word.startswith("-"):
            yield from _letters(word, left, rest)
        else:
            rest.append(word)


def _letters(word: str, left: Iterator[str], rest: list[str]) -> Iterator[Setting]:
    """Short options, more than one in a word perhaps; the first that takes a value takes what is left of it."""
    for i, letter in enumerate(word[1:], 1):
        option = _BY_LETTER.get(letter)
        if option is None:
            rest.append(f"-{word[i:]}")
            return
        if option.takes_value:
            value = word[i + 1 :]
            yield option, value if value or option.value_is_optional else _next(left, f"-{letter}")
            return
        yield option, None


def _next(left: Iterator[str], name: str) -> str:
    for value in left:
        return value
    raise UsageError(f"{name}: a value is missing")


def _lookup(name: str) -> tuple[Option | None, bool]:
    """The option of this name, or of which this is the only beginning; and False for a --no- form."""
    names = {option.name: (option, True) for option in OPTIONS}
    names |= {f"no-{option.name}": (option, False) for option in OPTIONS if not option.takes_value}
    if name in names:
        return names[name]
    found = [names[full] for full in names if name and full.startswith(name)]
    return found[0] if len(found) == 1 else (None, True)


def _configured(given: Iterable[Setting]) -> Iterator[Setting]:
    """What the configuration files say, the least important first."""
    asked = [(option.name, value) for option, value in given]
    files = []
    if ("no-default-config", None) not in asked:
        files += [path for path in (SYSTEM_CONFIG, os.path.expanduser("~/.criu/default.conf")) if os.path.exists(path)]
    files += [path for path in [os.environ.get("CRIU_CONFIG_FILE")] if path]
    files += [value for name, value in asked if name == "config" and value]
    for path in files:
        yield from _read(path)


def _read(path: str) -> Iterator[Setting]:
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the configuration file {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"{path}:{number}: {error}") from error
        if not words:
            continue
        rest: list[str] = []
        # `name value` and `name=value` are the same.
        yield from _settings(["=".join([f"--{words[0]}", *words[1:]])], rest)
        if rest:
            raise UsageError(f"{path}:{number}: there is no option {words[0]}")


def size(text: str) -> int:
    """A number of bytes with K, M or G behind it.

    Raises:
        UsageError: it is none.
    """
    digits, factor = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1)
    if not digits.isdecimal():
        raise UsageError(f"{text!r} is no size (examples: 4096, 64K, 1M)")
    return int(digits) * factor


def network_lock(method: str | None) -> bool:
    """Whether --network-lock wants a lock. All methods of CRIU drop the same packets; phaul's is nftables.

    Raises:
        UsageError: there is no such method.
    """
    if method not in (None, "iptables", "nftables", "skip", "none"):
        raise UsageError(f"--network-lock: there is no method {method!r} (iptables, nftables, skip)")
    return method not in ("skip", "none")


def external_sockets(inode: str | None) -> bool:
    """Whether --ext-unix-sk is there.

    Raises:
        UsageError: it names one socket.
    """
    if inode:
        raise UsageError(f"phaul does not do --ext-unix-sk {inode} yet")
    return inode is not None


def level(text: str | None, default: int) -> int:
    """The level that -v asks for: a number, or one more than the default for each v, as CRIU reads it."""
    if text is None:
        return default
    if set(text) <= {"v"}:
        return default + 1 + len(text)
    # atoi(3) of what stands behind the last "=", 0 if that is no number: `-verbosity=0` is -v with a value.
    digits = text.rpartition("=")[2]
    return int(digits) if digits.isdigit() else 0
