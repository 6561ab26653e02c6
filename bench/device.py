"""``python -m bench.device``: everything a machine with a GPU can prove, in one command.

Builds the extension for the GPU that is there, runs the operator tests on the device, then measures the kernels beside
SDPA, FlexAttention and the ceilings of the same run. Downloads nothing. The most telling rows come first, the result
file is written after each, and what does not fit into --minutes is left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import results
from .progress import Progress

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["test_prefix_attn", "test_clip_qk_layernorm", "test_edges", "test_layouts"]


class Clock:
    """The time that is left of the whole command."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self.end - time.monotonic())


def obstacles() -> list[str]:
    """Why nothing can be measured here; empty on a machine with a usable GPU."""
    if not torch.cuda.is_available():
        return [f"torch {torch.__version__} sees no GPU (a CUDA build of torch and a driver are needed)"]
    missing = [name for name in ("pybind11", "pytest") if importlib.util.find_spec(name) is None]
    return [f"{name} is not installed" for name in missing]


def build(clock: Clock) -> list[str]:
    """Compiles in place for this GPU only; returns what went wrong."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}-real"
    folder = ROOT / "build" / "device"
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DINTERNVL_CUDA_ARCHS={architecture}"]
    for step in (configure, ["cmake", "--build", folder]):
        try:
            done = subprocess.run(
                list(map(str, step)), capture_output=True, text=True, timeout=clock.left(), check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return [f"build: {error}"]
        if done.returncode:
            return [f"build failed:\n{(done.stdout + done.stderr)[-3000:]}"]
    return []


def test(backends: list[str], seconds: float) -> dict[str, dict]:
    """The operator tests on the device, per backend: counts and the tail of what failed."""
    found = {}
    for backend in backends:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-m",
            "not slow",
            "-k",
            backend,
            "-p",
            "no:cacheprovider",
        ]
        command += [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=max(30.0, seconds / len(backends)),
                check=False,
            )
            output, passed = done.stdout, done.returncode == 0
        except subprocess.TimeoutExpired as error:
            output, passed = (error.stdout or b"").decode(errors="replace"), False
        counts = re.findall(r"(\d+) (passed|failed|skipped|deselected|error)", output)
        found[backend] = {"passed": passed, "counts": {name: int(n) for n, name in counts}}
        if not passed:
            found[backend]["output"] = output[-4000:]
        print(f"tests on {backend}: {'passed' if passed else 'FAILED'} {found[backend]['counts']}", flush=True)
        if not passed:
            print(found[backend]["output"])
    return found


def measure(file: results.ResultFile, backends: tuple[str, ...], clock: Clock, match: str) -> None:
    """Ceilings, then the GPU plan until the time is up."""
    from . import gate, plan, roofline
    from .run import line

    file.data["ceilings"] = roofline.ceilings("cuda")
    file.write()
    print("ceilings  " + "  ".join(f"{name} {value:.0f}" for name, value in file.data["ceilings"].items()), flush=True)
    entries = [entry for entry in plan.gpu_entries(backends) if match in entry.name]
    progress = Progress([entry.name for entry in entries])
    left_out = []
    for entry in entries:
        if clock.left() == 0:
            left_out.append(entry.name)
            continue
        progress.start(entry.name)
        try:
            measurement = entry.prepare()
            measurement.rounds(entry.rounds)
            row = measurement.row(memory=entry.memory)
        except (gate.WrongResult, RuntimeError, NotImplementedError) as error:
            file.data.setdefault("failed", []).append({"entry": entry.name, "error": str(error)[:2000]})
            progress.done(f"{entry.name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        file.add(row, entry.name, entry.study)
        progress.done(line(row))
        torch.cuda.empty_cache()
    progress.close()
    if left_out:
        file.data["left_out"] = left_out
        print(f"out of time; not measured: {', '.join(left_out)}")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: %(default)s)")
    p.add_argument("--backends", nargs="+", choices=("cuda", "triton"), default=["cuda", "triton"])
    p.add_argument("--skip-build", action="store_true", help="use the libraries that are there")
    p.add_argument("--skip-tests", action="store_true", help="measure only; each row still passes its gate")
    p.add_argument("--match", default="", help="only measurements whose name holds this text")
    p.add_argument("--out", type=Path, help="result file (default: bench/results/<gpu>-<date>.json)")
    args = p.parse_args(argv)
    reasons = obstacles()
    if reasons:
        p.error("; ".join(reasons))
    clock = Clock(args.minutes)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
    if not args.skip_build:
        problems = build(clock)
        if problems:
            print("\n".join(problems), file=sys.stderr)
            return 1
        print(f"built; {clock.left():.0f} s left", flush=True)
    from internvl_kernels.backends import BACKENDS  # only now: the libraries load at import

    refused = {name: BACKENDS[name].here() for name in args.backends}
    for name, why in refused.items():
        if why:
            print(f"{name} does not run here: {'; '.join(why)}")
    backends = [name for name, why in refused.items() if not why]
    if not backends:
        return 1
    file = results.ResultFile(args.out or results.default_path("cuda"), "cuda")
    print(results.describe(file.data), flush=True)
    if not args.skip_tests:
        file.data["tests"] = test(backends, 0.45 * clock.left())
        backends = [name for name in backends if file.data["tests"][name]["passed"]]
    if backends:
        measure(file, tuple(backends), clock, args.match)
    from . import targets

    file.data["targets"] = targets.judge(file.rows, "cuda")
    file.write()
    print("\n".join(["", *targets.table(file.data["targets"]), f"wrote {file.path}"]))
    failed = any(not found["passed"] for found in file.data.get("tests", {}).values())
    return int(failed or "failed" in file.data)


if __name__ == "__main__":
    sys.exit(main())
