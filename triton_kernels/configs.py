"""Tile sizes, warps and stages as data, keyed by GPU, kernel, element size and head dim.

A row is chosen by the first key of ``gpu_keys`` that has it, so that a GPU states only what differs from ``default``.
``python -m internvl_kernels.triton_kernels.tune`` measures candidates on a GPU and prints rows for this table; nothing
is measured at import or in a call. The rows below were chosen by the compile table (no spills with 16-bit inputs); none
has been timed on a GPU yet.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

HEAD_DIM_STEPS = (64, 128, 256)  # a row serves head dims up to its step
MIN_BLOCK_D = 16  # tensor cores multiply at least 16 columns


@dataclasses.dataclass(frozen=True)
class Config:
    """One launch of an attention kernel: ``block_m`` query rows by ``block_n`` keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """What Triton calls the rest."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# kernel -> (bytes per element, head dim step) -> row. "decode" is the forward with packed heads and split keys.
TABLE: dict[str, dict[str, dict[tuple[int, int], Config]]] = {
    "default": {
        "fwd": {
            (2, 64): Config(128, 64, 8, 3),
            (2, 128): Config(64, 32, 4, 2),
            (2, 256): Config(64, 32, 8, 2),
            (4, 64): Config(64, 32, 4, 2),
            (4, 128): Config(32, 32, 4, 2),
            (4, 256): Config(32, 16, 8, 1),
        },
        "decode": {
            (2, 64): Config(16, 128, 4, 3),
            (2, 128): Config(16, 64, 4, 3),
            (2, 256): Config(16, 32, 4, 2),
            (4, 64): Config(16, 64, 4, 2),
            (4, 128): Config(16, 32, 4, 2),
            (4, 256): Config(16, 16, 4, 2),
        },
        "dkdv": {
            (2, 64): Config(32, 128, 8, 2),
            (2, 128): Config(16, 128, 8, 2),
            (2, 256): Config(32, 32, 8, 1),
            (4, 64): Config(32, 32, 4, 1),
            (4, 128): Config(16, 32, 4, 1),
            (4, 256): Config(16, 16, 4, 1),
        },
        "dq": {
            (2, 64): Config(128, 32, 8, 2),
            (2, 128): Config(128, 32, 8, 2),
            (2, 256): Config(32, 32, 4, 1),
            (4, 64): Config(32, 32, 4, 1),
            (4, 128): Config(32, 16, 4, 1),
            (4, 256): Config(16, 16, 4, 1),
        },
    },
    "sm90": {  # wgmma reads its operands from shared memory, and wants 64 rows
        "fwd": {(2, 128): Config(128, 64, 8, 2), (2, 256): Config(128, 32, 8, 2)},
        "dq": {(2, 64): Config(128, 64, 8, 2), (2, 128): Config(128, 64, 8, 2)},
    },
    "sm100": {
        "fwd": {(2, 256): Config(64, 16, 8, 2)},
        "decode": {(2, 64): Config(16, 64, 4, 3)},
        "dkdv": {(2, 128): Config(32, 32, 4, 2)},
    },
    "amd": {  # 64 lanes a warp: eight of them leave half of the registers to each
        "fwd": {(2, 64): Config(64, 64, 4, 2), (2, 256): Config(32, 32, 4, 2)},
        "dkdv": {(2, 64): Config(32, 64, 4, 1), (2, 128): Config(16, 32, 4, 1), (2, 256): Config(16, 16, 4, 1)},
        "dq": {(2, 64): Config(64, 64, 4, 2), (2, 128): Config(64, 32, 4, 2), (2, 256): Config(32, 16, 4, 1)},
    },
    # The interpreter: small enough for the tests' short sequences to hold several tiles of every class.
    "interpreter": {
        kernel: {(size, step): Config(*blocks, 4, 1) for size in (2, 4) for step in HEAD_DIM_STEPS}
        for kernel, blocks in {"fwd": (64, 64), "decode": (16, 64), "dkdv": (64, 64), "dq": (64, 64)}.items()
    },
}

# Key (or query) tiles that are classified at a time: one bit each of an int64. Small in the interpreter, so that short
# sequences have several.
CHUNK = {"default": 64, "interpreter": 2}
# clip_qk_layernorm: elements of a program's tile, and programs of the backward (the order of its sums follows).
NORM_TILE = {"default": 4096, "interpreter": 4096}
NORM_BACKWARD_PROGRAMS = {"default": 256, "interpreter": 7}
# Norms cost one read of k and v: below this many keys pruning saves less than that.
PRUNE_MIN_KEYS = {"default": 512, "interpreter": 96}
# K and V of the heads that are walked together fit in this part of the L2 cache.
L2_BYTES = {"sm80": 20 << 20, "sm90": 25 << 20, "sm100": 48 << 20, "default": 4 << 20}


@functools.cache
def gpu_keys(device_type: str, index: int | None) -> tuple[str, ...]:
    """Keys of the tables for a device, most specific first; "default" is the last, and all there is without a GPU."""
    if device_type == "cpu":
        return ("interpreter", "default")
    if not torch.cuda.is_available():
        return ("default",)
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        return (arch, "amd", "default")
    major, minor = torch.cuda.get_device_capability(index)
    return (f"sm{major}{minor}", f"sm{major}0", "default")


@functools.cache
def multiprocessors(device_type: str, index: int | None) -> int:
    """How many blocks it takes to occupy the device once; 132 (an H100) where nothing can be asked."""
    if device_type == "cpu":
        return 16
    return torch.cuda.get_device_properties(index).multi_processor_count if torch.cuda.is_available() else 132


def of_gpu(table: dict, keys: tuple[str, ...]):
    """The entry of the first key that has one."""
    return next(table[key] for key in keys if key in table)


def attention(kernel: str, keys: tuple[str, ...], dtype: torch.dtype, head_dim: int) -> Config:
    """The row for a call."""
    row = (dtype.itemsize, next(step for step in HEAD_DIM_STEPS if head_dim <= step))
    return next(TABLE[key][kernel][row] for key in keys if row in TABLE.get(key, {}).get(kernel, {}))


def block_d(head_dim: int) -> int:
    """Columns of a tile: the next power of two."""
    return max(MIN_BLOCK_D, 1 << (head_dim - 1).bit_length())


def row_warps(head_dim: int) -> int:
    """Warps of the kernel that reads whole query rows before the backward: four spill at 256 columns on sm80."""
    return 8 if block_d(head_dim) == 256 else 4
