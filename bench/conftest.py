"""Interleaved comparison on top of pytest-benchmark, and the table printed at the end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

ROWS: list[dict] = []
SLOW_SECONDS = 2.0


@pytest.fixture
def compare(benchmark):
    """``compare(group, ours, peers, flops=..., target=(peer, ratio))``: one round = one call of everyone, in turn.

    pytest-benchmark owns our timing; the peers are timed in the setup of each round, so that a slow moment of the
    machine meets all of them. Medians and ratios go to ``extra_info`` and to the table.
    """

    def run(
        group: str,
        ours: Callable[[], object],
        peers: dict[str, Callable[[], object]],
        *,
        flops: float | None = None,
        target: tuple[str, float] | None = None,
        rounds: int = 5,
    ) -> None:
        seconds: dict[str, list[float]] = {name: [] for name in peers}

        def time_peers() -> None:
            for name, peer in peers.items():
                if seconds[name] and seconds[name][-1] > SLOW_SECONDS:
                    continue  # one call of it says enough
                start = time.perf_counter()
                peer()
                seconds[name].append(time.perf_counter() - start)

        benchmark.group = group
        benchmark.pedantic(ours, setup=time_peers, rounds=rounds, warmup_rounds=1)
        own = benchmark.stats.stats.median
        # The first call is the warm-up, unless it was so slow that it stayed the only one.
        medians = {name: statistics.median(times[1:] or times) for name, times in seconds.items()}
        row = {"case": group, "ours_ms": own * 1e3, "ratios": {name: t / own for name, t in medians.items()}}
        row["gflops"] = flops / own / 1e9 if flops else None
        row["target"] = target
        benchmark.extra_info.update(ratios=row["ratios"], gflops=row["gflops"], threads=torch.get_num_threads())
        ROWS.append(row)

    return run


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    write("")
    threads = torch.get_num_threads()
    write(f"ours against what a user would pick instead ({threads} threads, medians of interleaved rounds)")
    write(f"{'case':<44} {'ours ms':>9} {'GFLOP/s':>8}  speed-up over")
    for row in ROWS:
        ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratios"].items())
        verdict = ""
        if row["target"]:
            peer, wanted = row["target"]
            verdict = f"  (target {peer} >= {wanted:g}x: {'met' if row['ratios'][peer] >= wanted else 'MISSED'})"
        rate = f"{row['gflops']:.0f}" if row["gflops"] else ""
        write(f"{row['case']:<44} {row['ours_ms']:>9.3f} {rate:>8}  {ratios}{verdict}")
