"""How long each phase took: feeds the report and `--json` alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Timeline:
    """Named spans on one monotonic clock.

    Attributes:
        phases: name -> seconds, in the order in which they began; repeats add up.
    """

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._start = time.monotonic()

    @property
    def total(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._start

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what runs inside, also when it fails."""
        self.phases.setdefault(name, 0.0)
        begin = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] += time.monotonic() - begin
