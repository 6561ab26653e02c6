"""Processes that may crash or hang: run to an end or a time limit, or asked one question after another."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path

KEPT = 3000  # characters of a process's last words


def _end(child: subprocess.Popen) -> None:
    """Ends it and everything it started (it leads a session of its own)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def finish(command: list, seconds: float, folder: Path) -> tuple[int | None, str]:
    """Exit code and output of a command; None instead of the code when its time was up and it was ended."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            child = subprocess.Popen(
                [str(part) for part in command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return 127, str(error)
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
        output.seek(0)
        return code, output.read()


class Worker:
    """A process that answers each line on its input with a line of JSON; started when asked, again after it broke.

    An answer with "broken" says that the process is of no more use. What it writes to stderr becomes its last words.
    """

    def __init__(self, command: list[str], folder: Path) -> None:
        self.command, self.folder = command, folder
        self._child: subprocess.Popen | None = None
        self._read = b""
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed with the worker

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        self._log.close()

    def running(self) -> bool:
        """Has it been started, and not ended?"""
        return self._child is not None

    def ask(self, request: str, seconds: float) -> dict:
        """Its answer, or {"error": why there is none}."""
        if self._child is None:
            self._start()
        try:
            self._child.stdin.write(f"{request}\n".encode())
            self._child.stdin.flush()
            line = self._line(time.monotonic() + seconds)
        except OSError:  # it ended before it read
            line = b""
        if line is None:
            return self._lost(f"no answer within {seconds:.0f} s")
        if not line:
            return self._lost(f"the process ended with {self._exit_code()}")
        answer = json.loads(line)
        if answer.pop("broken", False):
            self.stop()
        return answer

    def stop(self) -> None:
        """Ends the process."""
        if self._child is not None:
            _end(self._child)
            self._child.stdin.close()
            self._child.stdout.close()
            self._child = None

    def _start(self) -> None:
        self._read = b""
        self._log.seek(0)
        self._log.truncate()
        self._child = subprocess.Popen(
            self.command,
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            start_new_session=True,
        )

    def _line(self, end: float) -> bytes | None:
        """The next line; empty when the process closed its output, None when the time was up."""
        while b"\n" not in self._read:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._child.stdout], [], [], left)[0]:
                return None
            part = self._child.stdout.read(1 << 16)
            if not part:
                return b""
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _exit_code(self) -> str:
        try:
            code = self._child.wait(5)
        except subprocess.TimeoutExpired:
            return "its output closed"
        return signal.Signals(-code).name if code < 0 else f"code {code}"

    def _lost(self, why: str) -> dict:
        self.stop()
        self._log.seek(0)
        words = self._log.read()[-KEPT:].strip()
        return {"error": f"{why}: {words}" if words else why}
