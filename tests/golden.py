"""Replays the golden bank through this package's classes.

    python -m tests.golden --bank tests/golden_bank [--only mpt] [--impl torch|flash|triton|all]

Prints every mismatch, and every stated deviation with its reason; the last line counts them. A runner
(``register``) replays the cases whose id starts with its prefix; cases without one are listed as not in this version.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.golden_reader import Case, case_ids
from tests.golden_registry import RUNNERS, Outcome, runner_for

RUNNER_MODULES = (
    "tests.golden_mpt",
    "tests.golden_llava",
    "tests.golden_qllama",
    "tests.golden_internvl",
    "tests.golden_prefix_lm",
)
IMPLS = ("torch", "flash", "triton", "eager", "internvl")


def replay(bank: Path, case_id: str, impls: tuple[str, ...] = IMPLS) -> Iterator[tuple[str, Outcome]]:
    """(implementation, outcome) of every call of a case that has a runner."""
    case = Case(bank, case_id)
    runner = runner_for(case_id)
    for impl in runner.impls:
        if impl in impls or runner.impls == ("any",):
            for outcome in runner.run(case, impl):
                yield impl, outcome


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.splitlines()[0])
    parser.add_argument("--bank", type=Path, required=True, help="folder with index.json")
    parser.add_argument("--only", default="", metavar="PREFIX", help="cases whose id starts with this")
    parser.add_argument("--impl", default="all", choices=(*IMPLS, "all"), help="attention implementation")
    options = parser.parse_args(arguments)
    impls = IMPLS if options.impl == "all" else (options.impl,)

    torch.manual_seed(0)
    compared = mismatches = deviations = not_applicable = 0
    missing = []
    for case_id in case_ids(options.bank):
        if not case_id.startswith(options.only):
            continue
        if runner_for(case_id) is None:
            missing.append(case_id)
            continue
        for impl, outcome in replay(options.bank, case_id, impls):
            where = f"{case_id} [{impl}] {outcome.call}"
            if outcome.not_applicable:
                not_applicable += 1
                print(f"not applicable: {where}: {outcome.not_applicable}")
                continue
            compared += 1
            if outcome.problems:
                mismatches += 1
                print(f"MISMATCH: {where}: {'; '.join(outcome.problems)}")
            elif outcome.deviation:
                deviations += 1
                print(f"stated deviation: {where}: {outcome.deviation}")
    if missing:
        print(f"not in this version ({len(missing)} cases): {' '.join(missing)}")
    if not_applicable:
        print(f"not applicable to an implementation, so not compared: {not_applicable} calls")
    print(f"golden: {compared} calls compared, {mismatches} mismatches, {deviations} stated deviations")
    return 1 if mismatches or not compared else 0


for _module in RUNNER_MODULES:
    importlib.import_module(_module)
assert RUNNERS

if __name__ == "__main__":
    sys.exit(main())
