"""This machine's ceilings, measured in the same process as the kernels they bound.

Each probe is also a callable of a wanted amount of work, so that a measurement can interleave its own ceiling.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
STREAM_MIB = {"cpu": 256, "cuda": 4096}


def synchronise(device: str) -> None:
    """Waits for the device; nothing on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def best_seconds(run: Callable[[], object], device: str = "cpu", rounds: int = 5) -> float:
    """Fastest of ``rounds`` timed calls after one warm-up."""
    times = []
    for _ in range(rounds + 1):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def matmul_of(flops: float, dtype: torch.dtype, device: str = "cpu") -> Callable[[], object]:
    """A plain product of random matrices with about ``flops`` operations."""
    size = MATMUL_SIZE[device]
    columns = max(16, round(flops / (2 * size * size)) // 16 * 16)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, columns, device=device).to(dtype)
    return lambda: a @ b


@functools.cache
def matmul_dtype(name: str, device: str = "cpu") -> str:
    """The dtype whose ``torch.mm`` is the ceiling for kernels on ``name`` inputs.

    A processor without bf16 or fp16 instructions multiplies them slower than fp32, up to a hundred times; its ceiling
    is the fp32 product.
    """
    if device != "cpu" or name == "float32":
        return name
    a = torch.randn(192, 192)
    low = a.to(getattr(torch, name))
    return name if best_seconds(lambda: low @ low) < best_seconds(lambda: a @ a) else "float32"


def read_of(nbytes: int, device: str = "cpu") -> Callable[[], object]:
    """Reads about ``nbytes``: a dot product of two fp32 vectors (the fastest reading torch offers)."""
    x, y = (torch.randn(max(1, nbytes // 8), device=device) for _ in range(2))
    return lambda: torch.dot(x, y)


def copy_of(nbytes: int, device: str = "cpu") -> Callable[[], object]:
    """Moves about ``nbytes``, half of it read, half written."""
    source = torch.randn(max(1, nbytes // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def stream_of(reads: int, results: list[torch.Tensor]) -> Callable[[], object]:
    """Reads ``reads`` (1: copies, 2: adds) numbers for each that it writes, into new tensors like ``results``.

    New memory costs more than what was used before, and how much depends on the size of each tensor.
    """
    sources = [[torch.ones_like(t) for _ in range(reads)] for t in results]
    if reads == 1:
        return lambda: [source.clone() for (source,) in sources]
    return lambda: [torch.add(a, b) for a, b in sources]


def ceilings(device: str = "cpu", dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> dict[str, float]:
    """Matrix product (GFLOP/s per dtype), exponential (Gelement/s), reading and copying (GB/s) of this machine."""
    found = {}
    for name in sorted({matmul_dtype(name, device) for name in dtypes}):
        flops = 2.0 * MATMUL_SIZE[device] ** 3
        found[f"matmul_{name}_gflops"] = (
            flops / best_seconds(matmul_of(flops, getattr(torch, name), device), device) / 1e9
        )
    x = torch.randn(1 << 22, device=device)
    out = torch.empty_like(x)
    found["exp_gelements"] = x.numel() / best_seconds(lambda: torch.exp(x, out=out), device) / 1e9
    nbytes = STREAM_MIB[device] << 20
    found["read_gbytes"] = nbytes / best_seconds(read_of(nbytes, device), device) / 1e9
    found["copy_gbytes"] = nbytes / best_seconds(copy_of(nbytes, device), device) / 1e9
    return found
