"""Every environment variable of the package, and ``python -m internvl_kernels.env [--json]``.

Python reads the variables here only; the compiled library reads ``INTERNVL_CPU_ISA`` itself when it is
loaded and ``INTERNVL_ALIBI_PRUNE`` at every call, and the build reads the variables marked "build".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata

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


def triton_interpret() -> bool:
    """Triton's own ``TRITON_INTERPRET``: its kernels run on CPU tensors, slowly, without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def report() -> dict:
    """Everything a bug report needs, as plain JSON values."""
    import torch

    from . import __version__, backends, registration

    packages = ("torch", "triton", "transformers", "einops", "pybind11", "ninja", "numpy")
    return {
        "internvl_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "library": registration.library_path(),
        "library_error": registration.LIBRARY_ERROR,
        "build": registration.build_info(),
        "cpu": {"threads": torch.get_num_threads(), **registration.cpu_info()},
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": {b.name: {"where": b.where, "reasons": b.here()} for b in backends.BACKENDS.values()},
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def render(info: dict) -> str:
    """The report as text for a terminal."""
    lines = [f"internvl_kernels {info['internvl_kernels']}  (python {info['python']}, {info['platform']})"]
    lines.append("packages   " + "  ".join(f"{k} {v or 'missing'}" for k, v in info["packages"].items()))
    lines.append(f"library    {info['library'] or 'not built'}")
    if info["library_error"]:
        lines.append(f"           {info['library_error']}")
    lines.append("build      " + "  ".join(f"{k}={v}" for k, v in info["build"].items()))
    lines.append("cpu        " + "  ".join(f"{k}={v}" for k, v in info["cpu"].items()))
    lines.append("cuda       " + (", ".join(info["cuda_devices"]) or "no CUDA device"))
    lines.append("backends")
    for name, row in info["backends"].items():
        state = "runs here" if not row["reasons"] else "; ".join(row["reasons"])
        lines.append(f"  {name:<10} {row['where']:<28} {state}")
    lines.append("variables")
    for name, text in VARIABLES.items():
        value = info["variables"][name]
        lines.append(f"  {name:<20} {'unset' if value is None else value!r:<12} {text}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m internvl_kernels.env",
        description="Print versions, the compiled library, the processor, and which backends run here and why not.",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    args = parser.parse_args(argv)
    info = report()
    print(json.dumps(info, indent=2) if args.json else render(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
