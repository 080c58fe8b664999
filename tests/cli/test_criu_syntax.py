"""The command line as CRIU reads it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from phaul.cli import criu_syntax
from phaul.cli.criu_options import ALL, OPTIONS
from phaul.cli.criu_syntax import canonical
from phaul.errors import UsageError


@pytest.fixture(autouse=True)
def no_default_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CRIU_CONFIG_FILE", raising=False)
    monkeypatch.setattr(criu_syntax, "SYSTEM_CONFIG", str(tmp_path / "none.conf"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-t", "5"], ["--tree=5"]),
        (["-t5"], ["--tree=5"]),
        (["--tree", "-1"], ["--tree=-1"]),
        (["-Rjt5", "-D/d"], ["--tree=5", "--images-dir=/d", "--leave-running", "--shell-job"]),
        (["-v"], ["--verbosity="]),
        (["-v", "-R"], ["--verbosity=", "--leave-running"]),
        (["-v4"], ["--verbosity=4"]),
        (["-vvv"], ["--verbosity=vv"]),
        (["-verbosity=0"], ["--verbosity=erbosity=0"]),
        (["--verbosity=3"], ["--verbosity=3"]),
        (["--no-default-config", "--no-default-config"], ["--no-default-config"]),
        (["--shell-job", "--no-shell-job"], []),
        (["--no-shell-job", "--shell-job"], ["--shell-job"]),
        (["--leave-r"], ["--leave-running"]),
        (["--leave"], ["--leave"]),
        (["--action-script", "a", "--action-script=b"], ["--action-script=a", "--action-script=b"]),
        (["--timeout", "10", "--pre-dump-mode", "splice", "--pidfile", "p"], []),
        (["--root", "/", "--cpu-cap=none", "--manage-cgroups=ignore"], []),
        (["--no-lazy-pages"], []),
        (["--debug", "--json", "--help", "-h", "--wings"], ["--debug", "--json", "--help", "-h", "--wings"]),
        (["--", "-t"], ["--", "-t"]),
    ],
)
def test_canonical(words: list[str], expected: list[str]) -> None:
    assert canonical("dump", words) == expected


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("dump", ["--lazy-pages"], "phaul does not do --lazy-pages yet"),
        ("restore", ["--lazy"], "phaul does not do --lazy-pages yet"),
        ("dump", ["--stream"], "phaul does not do --stream yet"),
        ("dump", ["--external", "mnt[]"], "phaul does not do --external mnt[] yet"),
        ("restore", ["-r", "/new"], "phaul does not do --root /new yet"),
        ("dump", ["--manage-cgroups"], "phaul does not do --manage-cgroups yet"),
        ("restore", ["--manage-cgroups=ignore", "--manage-cgroups=full"], "does not do --manage-cgroups full yet"),
        ("check", ["--extra"], "phaul does not do --extra yet"),
        ("dump", ["--tree"], "--tree: a value is missing"),
        ("dump", ["-Rt"], "-t: a value is missing"),
        ("dump", ["--config", "/no/such/file"], "cannot read the configuration file /no/such/file"),
    ],
)
def test_refused(command: str, words: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        canonical(command, words)
    assert says in str(caught.value)


def test_configuration_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones win; --no-default-config leaves out those at fixed places."""
    for name, text in {
        "system": "tree 1\nlog-file a\n",
        "home/.criu/default.conf": "tree 2\n",
        "variable": "tree=3\nshell-job\n",
        "asked": "# a comment\n\n  tree 4 # another\nno-shell-job\nlog-file 'two words'\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(criu_syntax, "SYSTEM_CONFIG", str(tmp_path / "system"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert canonical("dump", []) == ["--tree=1", "--tree=2", "--log-file=a"]
    assert canonical("dump", ["--no-default-config"]) == ["--no-default-config"]
    monkeypatch.setenv("CRIU_CONFIG_FILE", str(tmp_path / "variable"))
    assert canonical("dump", ["-t9"]) == ["--tree=1", "--tree=2", "--tree=3", "--tree=9", "--log-file=a", "--shell-job"]
    asked = str(tmp_path / "asked")
    found = canonical("dump", ["--config", asked])
    assert "--shell-job" not in found
    assert [word for word in found if "tree" in word][-1] == "--tree=4"
    assert [word for word in found if "log" in word][-1] == "--log-file=two words"


@pytest.mark.parametrize("line", ["wings", "tree '5", "unknown-option 5"])
def test_wrong_configuration(tmp_path: Path, line: str) -> None:
    (tmp_path / "conf").write_text(f"shell-job\n{line}\n")
    with pytest.raises(UsageError, match=r"conf:2: "):
        canonical("dump", ["--config", str(tmp_path / "conf")])


def test_the_table() -> None:
    """Each name and letter once; each option says what happens to it with every command."""
    names = [option.name for option in OPTIONS]
    letters = [option.short for option in OPTIONS if option.short]
    # criu(8) has 85; --help and --version belong to argparse.
    assert len(names) == len(set(names)) == 83
    assert len(letters) == len(set(letters))
    for option in OPTIONS:
        assert not set(option.does) & set(option.refuses), option.name
        assert {*option.does, *option.refuses} <= set(ALL), option.name
        assert bool(option.dropped) == (not option.does and not option.refuses), option.name
        assert bool(option.help) == bool(option.does), option.name
        assert option.refuses or not option.accepts, option.name


@pytest.mark.parametrize("command", ALL)
def test_every_option_is_taken_dropped_or_refused(command: str) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    criu_syntax.add_arguments(parser, command)
    for option in OPTIONS:
        if option.name == "config":
            continue
        word = f"--{option.name}" + ("=1" if option.takes_value else "")
        if command in option.refuses:
            with pytest.raises(UsageError, match=f"does not do --{option.name}"):
                canonical(command, [word])
        else:
            args = parser.parse_args(canonical(command, [word]))
            assert bool(getattr(args, option.dest, None)) == (command in option.does), option.name


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, 2), ("", 3), ("v", 4), ("vvv", 6), ("0", 0), ("4", 4), ("erbosity=0", 0), ("erbosity=3", 3), ("x", 0)],
)
def test_level(text: str | None, expected: int) -> None:
    assert criu_syntax.level(text, 2) == expected


def test_sizes() -> None:
    assert [criu_syntax.size(text) for text in ("0", "4096", "64K", "1M", "2G")] == [0, 4096, 1 << 16, 1 << 20, 2 << 30]
    for text in ("", "K", "-1", "1T", "1.5M"):
        with pytest.raises(UsageError, match="is no size"):
            criu_syntax.size(text)


def test_network_lock_methods() -> None:
    assert [criu_syntax.network_lock(name) for name in (None, "iptables", "nftables", "skip", "none")] == [
        *[True] * 3,
        *[False] * 2,
    ]
    with pytest.raises(UsageError, match="there is no method 'ebtables'"):
        criu_syntax.network_lock("ebtables")


def test_external_sockets() -> None:
    assert [criu_syntax.external_sockets(value) for value in (None, "")] == [False, True]
    with pytest.raises(UsageError, match="does not do --ext-unix-sk 123 yet"):
        criu_syntax.external_sockets("123")
