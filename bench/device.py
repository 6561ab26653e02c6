"""``python -m bench.device``: everything a machine with a GPU can prove, in one command.

Builds the extension for the GPU that is there, runs the operator tests on the device, then measures the kernels beside
SDPA, FlexAttention and the ceilings of the same run. Downloads nothing. The most telling rows come first and the result
file is written after each; what does not fit into --minutes is left out and named. Kernels run in processes of their
own: one that crashes or never ends costs its row, not the run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import torch

from .child import Worker, finish

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["test_prefix_attn", "test_clip_qk_layernorm", "test_edges", "test_layouts"]
TEST_SHARE = 0.45  # of the time that the build leaves
ROW_SECONDS = 90.0  # a row that takes longer is given up
START_SECONDS = 60.0  # what the first row of a process may take beside that: imports, the driver, the context
KERNELS = ("best", "sm80")


class Clock:
    """The time that is left of the whole command."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self.end - time.monotonic())


def obstacles(args: argparse.Namespace) -> list[str]:
    """Why nothing can be measured here; empty on a machine with a usable GPU and what the steps need."""
    if not torch.cuda.is_available():
        return [f"torch {torch.__version__} sees no GPU (a CUDA build of torch and a driver are needed)"]
    modules = ([] if args.skip_build else ["pybind11"]) + ([] if args.skip_tests else ["pytest"])
    found = [f"{name} is not installed" for name in modules if importlib.util.find_spec(name) is None]
    if not args.skip_build and shutil.which("cmake") is None:
        found.append("cmake is not on the path (pip install cmake; --skip-build uses the libraries that are there)")
    return found


def architectures(capability: tuple[int, int], kernels: str) -> str:
    """INTERNVL_CUDA_ARCHS for one device. Hopper has kernels of its own, in code for exactly 9.0 (90a)."""
    number = f"{capability[0]}{capability[1]}"
    own = ["90-real", "90a-real"] if capability == (9, 0) and kernels == "best" else [f"{number}-real"]
    return ";".join(own)


def build(clock: Clock, kernels: str) -> list[str]:
    """Compiles in place for this GPU only; returns what went wrong."""
    folder = ROOT / "build" / f"device-{kernels}"
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-G", "Ninja" if shutil.which("ninja") else "Unix Makefiles"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DINTERNVL_CUDA_ARCHS={architectures(torch.cuda.get_device_capability(), kernels)}"]
    for step in (configure, ["cmake", "--build", folder, "--parallel", os.cpu_count() or 1]):
        code, output = finish(step, clock.left(), ROOT)
        if code != 0:
            what = "was not through when the time was up" if code is None else "failed"
            return [f"the build {what}:\n{output[-3000:]}"]
    return []


def test(backends: list[str], seconds: float) -> dict[str, dict]:
    """The operator tests on the device, per backend: verdict, counts and the tail of what failed.

    The verdict is "passed", "failed", or "not finished" when the time was up.
    """
    end = time.monotonic() + seconds
    found = {}
    for i, backend in enumerate(backends):
        command = [sys.executable, "-m", "pytest", "-v", "--maxfail=5", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-m", "not slow", "-k", backend, "-o", "faulthandler_timeout=60"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", min(8, os.cpu_count() or 1)]
        command += [ROOT / "tests" / f"{name}.py" for name in TESTS]
        code, output = finish(command, max(30.0, (end - time.monotonic()) / (len(backends) - i)), ROOT)
        counts = {name: int(n) for n, name in re.findall(r"\b(\d+) (passed|failed|skipped|error)", output)}
        verdict = "not finished" if code is None else "passed" if code == 0 and counts.get("passed") else "failed"
        found[backend] = {"verdict": verdict, "counts": counts}
        print(f"tests on {backend}: {verdict} {counts}", flush=True)
        if verdict != "passed":
            found[backend]["output"] = output[-4000:]
            print(found[backend]["output"], flush=True)
    return found


def measure(file, names: list[str], worker: Worker, clock: Clock) -> None:
    """Ceilings, then the rows of the plan in their order until the time is up. Writes the file after each."""
    from .progress import Progress
    from .run import line

    def ask(request: str) -> dict:
        limit = ROW_SECONDS if worker.running() else ROW_SECONDS + START_SECONDS
        return worker.ask(request, min(limit, clock.left()))

    def failed(name: str, error: str) -> None:
        file.data.setdefault("failed", []).append({"entry": name, "error": error[:4000]})
        file.write()

    answer = ask("ceilings")
    if "ceilings" in answer:
        file.data["ceilings"] = answer["ceilings"]
        print("ceilings  " + "  ".join(f"{name} {value:.0f}" for name, value in answer["ceilings"].items()), flush=True)
    else:
        failed("ceilings", answer["error"])
        print(f"ceilings: {answer['error'][:500]}", flush=True)
    progress = Progress(names)
    left_out = []
    for name in names:
        if clock.left() < 1:
            left_out.append(name)
            continue
        progress.start(name)
        answer = ask(name)
        if "row" in answer:
            file.add(answer["row"], name, answer["study"])
            progress.done(line(answer["row"]))
        elif clock.left() < 1:
            left_out.append(name)  # ended by the clock, not by its own fault
        else:
            failed(name, answer["error"])
            progress.done(f"{name}: {answer['error'][:500]}")
    progress.close()
    if left_out:
        file.data["left_out"] = left_out
        print(f"out of time; not measured: {', '.join(left_out)}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m bench.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: %(default)s)")
    p.add_argument("--backends", nargs="+", choices=("cuda", "triton"), default=["cuda", "triton"])
    p.add_argument("--kernels", choices=KERNELS, default="best", help="sm80: leave out what Hopper has of its own")
    p.add_argument("--skip-build", action="store_true", help="use the libraries that are there")
    p.add_argument("--skip-tests", action="store_true", help="measure only; each row still passes its gate")
    p.add_argument("--match", default="", help="only measurements whose name holds this text")
    p.add_argument("--revision", help="the commit to name in the result file where git cannot tell it")
    p.add_argument("--out", type=Path, help="result file (default: bench/results/<gpu>-<date>.json)")
    return p


def usable(wanted: list[str], problems: list[str]) -> list[str]:
    """The backends that can run, after the build: the library loads at the first import of the package."""
    from internvl_kernels.backends import BACKENDS

    refused = {name: BACKENDS[name].here() for name in wanted}
    if problems and "cuda" in refused:
        refused["cuda"].append("the build failed")
    for name, why in refused.items():
        if why:
            print(f"{name} does not run here: {'; '.join(why)}", flush=True)
    return [name for name, why in refused.items() if not why]


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    # Tools that pip installed stand beside the interpreter; the package is used from this tree, built or not.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT / "python"))
    reasons = obstacles(args)
    if reasons:
        p.error("; ".join(reasons))
    clock, problems = Clock(args.minutes), []
    if not args.skip_build:
        problems = build(clock, args.kernels)
        print("\n".join(problems) or f"built; {clock.left():.0f} s left", flush=True)
    backends = usable(args.backends, problems)
    if not backends:
        return 1
    from internvl_kernels.backends import cuda_kernels  # as above: not before the build

    from . import plan, results, targets

    file = results.ResultFile(args.out or results.default_path("cuda"), "cuda")
    file.data["revision"] = args.revision or file.data["revision"]
    if "cuda" in backends:
        file.data["cuda_kernels"] = cuda_kernels(torch.cuda.get_device_capability())
    if problems:
        file.data["build"] = problems
    print(results.describe(file.data), flush=True)
    if not args.skip_tests:
        file.data["tests"] = test(backends, TEST_SHARE * clock.left())
        file.write()
    names = [entry.name for entry in plan.gpu_entries(tuple(backends)) if args.match in entry.name]
    with Worker([sys.executable, "-m", "bench.device_worker", *backends], ROOT) as worker:
        measure(file, names, worker, clock)
    file.data["targets"] = targets.judge(file.rows, "cuda")
    file.write()
    print("\n".join(["", *targets.table(file.data["targets"]), f"wrote {file.path}"]))
    failed = any(found["verdict"] == "failed" for found in file.data.get("tests", {}).values())
    return int(failed or bool(problems) or "failed" in file.data)


if __name__ == "__main__":
    sys.exit(main())
