"""Interleaved rounds: everyone is called once per round, so that a slow moment of the machine meets all of them."""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

PEER_SECONDS = 6.0  # a peer that has had so much time in a measurement is called no more
FLUSH_BYTES = 256 << 20  # larger than the second-level cache of any GPU
BACKLOG_CYCLES = 1_000_000  # about half a millisecond in which the launches of a call queue up behind each other


class Timer:
    """Seconds of one call. On a GPU: events around it, the caches flushed before it, launched into a backlog, so that
    what Python needs to launch it is not counted."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None

    def __call__(self, run: Callable[[], object]) -> float:
        if self._flush is None:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(BACKLOG_CYCLES)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


class Rounds:
    """Times of several callables over rounds; the slow ones take part in fewer."""

    def __init__(self, calls: dict[str, Callable[[], object]], timer: Timer) -> None:
        self.calls, self.timer = calls, timer
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}
        self._warm: set[str] = set()

    def round(self) -> None:
        """One call of each; the first round is a warm-up for those that are quick."""
        for name, call in self.calls.items():
            if sum(self.seconds[name]) > PEER_SECONDS:
                continue
            elapsed = self.timer(call)
            if name not in self._warm and elapsed < PEER_SECONDS:
                self._warm.add(name)
                continue
            self._warm.add(name)
            self.seconds[name].append(elapsed)

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, spread and number of the timed calls of each."""
        return {name: summarise(times) for name, times in self.seconds.items() if times}


def summarise(times: list[float]) -> dict[str, float]:
    """median_ms, spread (interquartile range over the median) and rounds of a list of seconds."""
    median = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
    return {
        "median_ms": median * 1e3,
        "min_ms": min(times) * 1e3,
        "spread": (quartiles[2] - quartiles[0]) / median,
        "rounds": len(times),
    }


def peak_mib(run: Callable[[], object], device: str) -> float | None:
    """Memory that one call needs beyond what is there before it; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _status_kib("VmRSS")
        run()
        return (_status_kib("VmHWM") - before) / 1024
    except OSError:
        return None


def _status_kib(field: str) -> int:
    return int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1])
