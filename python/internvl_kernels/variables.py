"""Every environment variable of the package.

Python reads them here only; the compiled library reads ``INTERNVL_CPU_ISA`` itself when it is loaded and
``INTERNVL_ALIBI_PRUNE`` at every call, and the build reads the variables marked "build".
"""

from __future__ import annotations

import os

VARIABLES = {
    "INTERNVL_BACKEND": "default backend of every call: cuda, triton, cpu or reference (default: the first that runs)",
    "INTERNVL_CPU_ISA": "CPU kernels to use: baseline, avx2, avx512, avx512_bf16 (default: the best the processor has)",
    "INTERNVL_ALIBI_PRUNE": "0: also visit key tiles whose weight under ALiBi vanishes in rounding (default: 1)",
    "INTERNVL_CUDA": "build: 0 leaves the CUDA kernels out even when nvcc is found",
    "INTERNVL_HEAD_DIMS": "build: semicolon list of head dims compiled for CUDA (default: those of CMakeLists.txt)",
}


def default_backend() -> str | None:
    """``INTERNVL_BACKEND``, or None."""
    return os.environ.get("INTERNVL_BACKEND") or None


def alibi_prune() -> bool:
    """``INTERNVL_ALIBI_PRUNE``: skip key tiles whose weight under ALiBi is below the rounding of the output."""
    value = os.environ.get("INTERNVL_ALIBI_PRUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"INTERNVL_ALIBI_PRUNE is {value!r}; allowed: 0 (off), 1 (on, the default)")
    return value != "0"


def values() -> dict[str, str | None]:
    """What is set, by name; None where it is not."""
    return {name: os.environ.get(name) for name in VARIABLES}


def triton_interpret() -> bool:
    """Triton's own ``TRITON_INTERPRET``: its kernels run on CPU tensors, slowly, without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
