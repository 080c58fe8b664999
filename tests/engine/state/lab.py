"""Stopped processes whose state is dumped, and put into others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import cast

from phaul.engine.batch import Batch
from phaul.engine.skeleton import SkeletonProcess
from phaul.engine.source import SourceProcess, SourceTree
from phaul.images.imageset import ImageSet
from phaul.images.pb.core_pb2 import core_entry

PRELUDE = """
import ctypes, errno, os, select, signal, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def say(text):
    os.write(1, f"{text}\\n".encode())
def must(result):
    if result == -1:
        say(f"failed: {os.strerror(ctypes.get_errno())}")
        raise SystemExit(1)
    return result
def ready():
    say("ready")
def wait():
    return sys.stdin.readline()
"""


@dataclass
class Target:
    """A Python program that has said `ready`."""

    child: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        return self.child.pid

    def line(self) -> str:
        assert self.child.stdout
        return self.child.stdout.readline().rstrip("\n")

    def tell(self, text: str) -> None:
        assert self.child.stdin
        self.child.stdin.write(f"{text}\n")
        self.child.stdin.flush()


class Lab:
    """Starts targets and stops them; all are gone at the end of the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def start(self, script: str, *wrapper: str) -> Target:
        """Run a script up to its `ready()`, started by way of a wrapper (`env` for example)."""
        child = subprocess.Popen(
            [*wrapper, sys.executable, "-S", "-c", PRELUDE + script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._stack.enter_context(child)
        self._stack.callback(child.kill)
        target = Target(child)
        line = target.line()
        assert line == "ready", line
        return target

    def freeze(self, target: Target) -> SourceTree:
        tree = SourceTree(target.pid)
        tree.freeze()
        self._stack.callback(tree.thaw)
        return tree

    def stopped(self, script: str, *wrapper: str) -> SourceProcess:
        """A target, already stopped."""
        return self.freeze(self.start(script, *wrapper)).root


def _run(call: Batch, steps: Iterable[Iterator[None] | None]) -> None:
    """One batch; each step is recorded before the next one is made."""
    waiting = [step for step in steps if step is not None and next(step, call) is not call]
    call.run()
    for step in waiting:
        assert next(step, call) is call, "a module yields once"


def _has(modules: tuple[ModuleType, ...], function: str) -> list[ModuleType]:
    return [module for module in modules if hasattr(module, function)]


def dump(process: SourceProcess, *modules: ModuleType) -> ImageSet:
    """The images that some state modules make of a stopped process."""
    images = ImageSet()
    for thread in process.threads:
        thread.core = core_entry()
    leader = process.threads[0]
    call = leader.batch()
    _run(call, (module.dump_process(process, call, images) for module in _has(modules, "dump_process")))
    for thread in process.threads:
        call = thread.batch()
        _run(call, (module.dump_thread(thread, call, thread.core) for module in _has(modules, "dump_thread")))
        images.add(f"core-{thread.tid}", thread.core)
    return images


def cores(images: ImageSet) -> list[core_entry]:
    """The core entries, the leader's first."""
    return [images.one(name, core_entry) for name in images.names() if name.startswith("core-")]


def restore(process: SourceProcess, images: ImageSet, *modules: ModuleType) -> None:
    """Put dumped state into another stopped process with as many threads."""
    # What the modules use of a skeleton, a stopped process has as well.
    skeleton = cast(SkeletonProcess, process)
    renamed = ImageSet()
    for thread, core in zip(process.threads, cores(images), strict=True):
        renamed.add(f"core-{thread.tid}", core)
    call = skeleton.threads[0].batch()
    _run(call, (module.restore_process(skeleton, call, renamed) for module in _has(modules, "restore_process")))
    for empty, core in zip(skeleton.threads, cores(images), strict=True):
        call = empty.batch()
        _run(call, (module.restore_thread(empty, call, core) for module in _has(modules, "restore_thread")))
