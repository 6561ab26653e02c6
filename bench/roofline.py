"""This machine's ceilings, measured in the same process as the kernels they bound."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def best_seconds(run: Callable[[], object], rounds: int = 5) -> float:
    """Fastest of ``rounds`` timed calls after one warm-up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_gflops(dtype: torch.dtype, size: int = 1024) -> float:
    """``torch.mm`` of two random square matrices, GFLOP/s."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b) / 1e9


def copy_gbytes(mib: int = 256) -> float:
    """``Tensor.copy_`` well beyond the caches, read and write counted, GB/s."""
    source = torch.randn(mib << 18)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source)) / 1e9
