"""``python -m internvl_kernels.env [--json]``: what is installed, what runs here, and why the rest does not."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import metadata

import torch

from . import __version__, backends, registration, variables


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device(index: int) -> str:
    """A CUDA device, its compute capability, and which kernels serve it."""
    major, minor = torch.cuda.get_device_capability(index)
    text = f"{torch.cuda.get_device_name(index)}, {major}.{minor}"
    built = registration.build_info().get("cuda") and (major, minor) >= (8, 0)
    return text + (f", {backends.cuda_kernels((major, minor))} kernels" if built else "")


def report() -> dict:
    """Everything a bug report needs, as plain JSON values."""
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
        "cuda_devices": [_device(index) for index in range(torch.cuda.device_count())],
        "backends": {b.name: {"where": b.where, "reasons": b.here()} for b in backends.BACKENDS.values()},
        "variables": variables.values(),
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
    lines.append("cuda       " + ("; ".join(info["cuda_devices"]) or "no CUDA device"))
    lines.append("backends")
    for name, row in info["backends"].items():
        state = "runs here" if not row["reasons"] else "; ".join(row["reasons"])
        lines.append(f"  {name:<10} {row['where']:<28} {state}")
    lines.append("variables")
    for name, text in variables.VARIABLES.items():
        value = info["variables"][name]
        state = "unset" if value is None else repr(value)
        lines.append(f"  {name:<20} {state:<12} {text}")
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
