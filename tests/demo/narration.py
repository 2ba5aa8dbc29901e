"""What the demo prints: numbered steps, commands as a user would type them, and their output."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

_PROGRESS_SECONDS = 2.0


class DemoFailedError(Exception):
    """A step did not show what it says."""


class Narrator:
    """Prints steps with their times to standard output, and progress on slow ones."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._number = 0
        self._is_terminal = sys.stdout.isatty()

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self._began

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step; while it lasts longer than two seconds say so, then its time."""
        self._number += 1
        self.say(f"\n{self._strong(f'[{self._number}] {title}')}")
        began, done = time.monotonic(), Event()
        ticker = Thread(target=self._tick, args=(began, done), daemon=True)
        ticker.start()
        try:
            yield
        finally:
            done.set()
            ticker.join()
        self.say(f"    done in {time.monotonic() - began:.1f} s")

    def say(self, text: str) -> None:
        """Print a line."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def show(self, text: str) -> None:
        """Print something indented."""
        for line in text.rstrip().splitlines():
            self.say(f"    {line}")

    def command(self, text: str) -> None:
        """Print a command as a user would type it."""
        self.show(self._strong(f"$ {text}"))

    def check(self, is_true: bool, claim: str, found: object = "") -> None:
        """Print a claim that holds.

        Raises:
            DemoFailedError: It does not hold; the message says what was found instead.
        """
        if not is_true:
            raise DemoFailedError(f"not so: {claim}" + (f" (found {found})" if found else ""))
        self.show(f"✓ {claim}")

    def _strong(self, text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if self._is_terminal else text

    def _tick(self, began: float, done: Event) -> None:
        while not done.wait(_PROGRESS_SECONDS):
            if self._is_terminal:
                sys.stdout.write(f"    … {time.monotonic() - began:.0f} s\r")
                sys.stdout.flush()
