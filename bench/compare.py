"""``python -m bench.compare --base REV``: this tree against another revision, both in one run.

Builds REV in a temporary directory with the same Python, then lets one process per revision call the same inputs in
turn. Prints time(base) / time(this) per case: above 1 this tree is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from . import cases, gate
from .progress import Progress

ROOT = Path(__file__).resolve().parent.parent
TOLERATED = 0.95  # a median below this, by more than its spread, is reported as slower
SETTINGS = (
    ("alibi-d64", 1024, "prefix", "float32", "forward"),
    ("alibi-d128", 1024, "prefix", "float32", "forward"),
    ("alibi-d128", 1024, "prefix", "bfloat16", "forward"),
    ("alibi-d128", 2048, "packed", "float32", "forward"),
    ("mpt-30b", 512, "prefix", "float32", "forward"),
    ("alibi-d64", 1024, "prefix", "float32", "backward"),
    ("alibi-d128", 1024, "prefix", "bfloat16", "backward"),
    ("alibi-d128", 8192, "decode", "float32", "forward"),
    ("multi-query-d128", 16384, "decode", "bfloat16", "forward"),
)


def attention_case(model: str, seqlen: int, mask: str, dtype: str, direction: str) -> dict:
    """The public call of one setting as plain data for ``worker.py``."""
    case = cases.make(model, seqlen, mask=mask, dtype=dtype)
    _, inputs = gate.inputs_for(case)
    given = {name: value for name, value in inputs.mask.items() if value is not None}
    arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "alibi_slopes": inputs.alibi_slopes, **given}
    name = f"{direction} {case.name} {dtype}"
    return {
        "name": name,
        "function": "prefix_attention",
        "direction": direction,
        "leaves": "qkv",
        "arguments": arguments,
    }


def norm_case(direction: str, dtype: str) -> dict:
    """clip_qk_layernorm of 2048 tokens of MPT-1B, as plain data."""
    case = cases.make_norm("mpt-1b", 2048)
    kind = {"dtype": getattr(torch, dtype)}
    weights = {name: torch.randn(case.q_width, **kind) for name in ("q_weight", "q_bias", "k_weight", "k_bias")}
    qkv = torch.randn(case.rows, case.q_width + 2 * case.k_width, **kind)
    arguments = {"qkv": qkv, "q_width": case.q_width, "k_width": case.k_width, "clip": 6.0, **weights}
    return {
        "name": f"{direction} clip_qk_layernorm {case.name} {dtype}",
        "function": "clip_qk_layernorm",
        "direction": direction,
        "leaves": ["qkv"],
        "arguments": arguments,
    }


@contextlib.contextmanager
def built(revision: str, folder: Path) -> Iterator[Path]:
    """A work tree of ``revision`` with its libraries; yields its ``python`` folder."""
    tree = folder / "base"
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, revision], check=True)
    try:
        print(f"building {revision} in {tree} ...", flush=True)
        command = ["cmake", "-S", tree, "-B", folder / "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        command += [f"-DPython_EXECUTABLE={sys.executable}", "-DINTERNVL_CUDA=0"]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        log = folder / "build.log"
        with log.open("w") as out:
            for step in (command, ["cmake", "--build", folder / "build"]):
                done = subprocess.run(step, stdout=out, stderr=out, env={**os.environ, "PATH": path}, check=False)
                if done.returncode:
                    raise RuntimeError(f"{revision} does not build:\n{log.read_text()[-2000:]}")
        yield tree / "python"
    finally:
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=False)


class Side:
    """A revision's process."""

    def __init__(self, package_folder: Path, cases_file: Path) -> None:
        command = [sys.executable, Path(__file__).parent / "worker.py", package_folder, cases_file]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(list(map(str, command)), env=environment, **pipes)
        if self._answer() != "ready":
            raise RuntimeError(f"the process of {package_folder} did not start")

    def _answer(self) -> str:
        text = self.process.stdout.readline().strip()
        if not text:
            raise RuntimeError("a measuring process ended early; its message stands above")
        return text

    def seconds(self, number: int) -> float:
        """One timed call of case ``number``."""
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait(timeout=30)


def compare(base: Path, chosen: list[dict], rounds: int, folder: Path) -> list[tuple[str, float, float]]:
    """(case, median ratio base / this, spread) with the two revisions called in turn."""
    file = folder / "cases.pt"
    torch.save(chosen, file)
    sides = [Side(base, file), Side(ROOT / "python", file)]
    progress = Progress([case["name"] for case in chosen])
    found = []
    try:
        for number, case in enumerate(chosen):
            progress.start(case["name"])
            for side in sides:
                side.seconds(number)
            ratios = [sides[0].seconds(number) / sides[1].seconds(number) for _ in range(rounds)]
            quartiles = statistics.quantiles(ratios, n=4)
            found.append((case["name"], statistics.median(ratios), quartiles[2] - quartiles[0]))
            verdict = "  SLOWER" if _slower(found[-1]) else ""
            progress.done(f"{case['name']:<58} {found[-1][1]:>6.2f}x  ±{found[-1][2] / 2:.2f}{verdict}")
    finally:
        progress.close()
        for side in sides:
            side.close()
    return found


def _slower(row: tuple[str, float, float]) -> bool:
    _, ratio, spread = row
    return ratio + spread / 2 < TOLERATED


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    p.add_argument("--base", required=True, help="revision to compare with, e.g. main or v0.1.0")
    p.add_argument("--rounds", type=int, default=11, help="calls of each side per case (default: %(default)s)")
    p.add_argument("--match", default="", help="only cases whose name holds this text")
    args = p.parse_args(argv)
    chosen = [attention_case(*setting) for setting in SETTINGS]
    chosen += [
        norm_case(direction, dtype) for direction in ("forward", "backward") for dtype in ("float32", "bfloat16")
    ]
    chosen = [case for case in chosen if args.match in case["name"]]
    if not chosen:
        p.error(f"no case holds {args.match!r}")
    if args.rounds < 2:
        p.error(f"--rounds is {args.rounds}; allowed: at least 2")
    known = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--verify", "--quiet", f"{args.base}^{{commit}}"],
        check=False,
        stdout=subprocess.DEVNULL,
    )
    if known.returncode:
        p.error(f"--base is {args.base!r}, which git does not know")
    with tempfile.TemporaryDirectory() as name, built(args.base, Path(name)) as package:
        found = compare(package, chosen, args.rounds, Path(name))
    slower = [row for row in found if _slower(row)]
    print(f"{len(slower)} of {len(found)} slower than {args.base} by more than {1 - TOLERATED:.0%}")
    return bool(slower)


if __name__ == "__main__":
    sys.exit(main())
