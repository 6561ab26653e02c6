"""``python -m internvl_kernels.testing "Case(...)"``: rerun one case, as a failing test prints it."""

from __future__ import annotations

import argparse
import ast
import sys

from . import Case, correctness_gate


def parse_case(text: str) -> Case:
    """A ``Case`` from its repr; only literals are evaluated."""
    call = ast.parse(text.strip(), mode="eval").body
    if not isinstance(call, ast.Call) or getattr(call.func, "id", None) != "Case" or call.args:
        raise ValueError(f"case is {text!r}; expected Case(name=value, ...)")
    return Case(**{keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m internvl_kernels.testing", description=__doc__)
    parser.add_argument("case", help="as printed by a failing test: Case(seqlen_q=..., ...)")
    parser.add_argument("--backend", default="cpu")
    args = parser.parse_args(argv)
    case = parse_case(args.case)
    problems = correctness_gate(args.backend, case)
    print("\n".join([f"{args.backend}: {case!r}", *(problems or ["correct"])]))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
