"""A progress line for long runs: which measurement, how many are left, about how long."""

from __future__ import annotations

import sys
import time


class Progress:
    """On a terminal one line that rewrites itself; elsewhere one line per finished measurement."""

    def __init__(self, names: list[str], stream=None) -> None:
        self.stream = stream or sys.stderr
        self.total, self.finished, self.began = len(names), 0, time.monotonic()
        self.live = self.stream.isatty() and self.total > 1

    def start(self, name: str) -> None:
        """Says what is being measured."""
        if not self.live:
            return
        left = ""
        if self.finished:
            seconds = (time.monotonic() - self.began) / self.finished * (self.total - self.finished)
            left = f", about {seconds / 60:.0f} min left" if seconds >= 60 else f", about {seconds:.0f} s left"
        filled = 24 * self.finished // self.total
        bar = "#" * filled + "." * (24 - filled)
        self._write(f"[{bar}] {self.finished + 1}/{self.total}{left}  {name}")

    def done(self, text: str) -> None:
        """Prints the finished measurement on a line of its own."""
        self.finished += 1
        if self.live:
            self._write("")
        print(text, flush=True)

    def close(self) -> None:
        """Leaves the terminal clean."""
        if self.live:
            self._write("")

    def _write(self, text: str) -> None:
        self.stream.write(f"\r\x1b[2K{text[:150]}")
        self.stream.flush()
