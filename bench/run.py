"""``python -m bench.run``: measure one call, or a whole plan, against what a user would pick instead.

python -m bench.run --case mpt-7b --seqlen 2048                  one case, forward, against SDPA and eager attention
python -m bench.run --case alibi-d128 --direction backward --dtype bfloat16 --peers sdpa eager
python -m bench.run --op clip_qk_layernorm --case mpt-7b --seqlen 2048
python -m bench.run --plan core --out results.json               everything that `make bench` measures
python -m bench.run --plan full --match growth --out results.json --update      some rows again, into the same file
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from . import baselines, cases, gate, measure, plan, results, roofline, targets
from .progress import Progress

OPS = ("prefix_attn", "clip_qk_layernorm")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--op", choices=OPS, default="prefix_attn")
    p.add_argument("--case", help=f"model shape: {', '.join(cases.MODELS)} (norm: {', '.join(cases.NORMS)})")
    p.add_argument("--seqlen", type=int, default=1024, help="keys, or rows of the norm (default: %(default)s)")
    p.add_argument("--mask", choices=cases.MASKS, default="prefix", help="default: %(default)s")
    p.add_argument("--prefix", help="bidirectional keys, or a fraction such as 1/4 (default: the model's)")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    p.add_argument("--direction", choices=("forward", "backward"), default="forward")
    p.add_argument("--backend", default="cpu", help="cpu, cuda or triton (default: %(default)s)")
    p.add_argument("--peers", nargs="*", choices=sorted(baselines.PEERS), default=["sdpa", "eager"])
    p.add_argument("--rounds", type=int, default=measure.ROUNDS, help="timed rounds (default: %(default)s)")
    p.add_argument("--memory", action="store_true", help="also measure peak memory")
    p.add_argument("--plan", choices=("core", "full"), help="run a whole plan instead of one case (CPU)")
    p.add_argument("--match", nargs="+", help="of the plan, only entries whose name holds one of these texts")
    p.add_argument("--out", type=Path, help="result file; written after every row")
    p.add_argument(
        "--update", action="store_true", help="keep the rows that --out holds; those measured again take their places"
    )
    return p


def one_entry(args: argparse.Namespace) -> plan.Entry:
    """The case of the command line as an entry of a plan."""
    if args.case is None:
        raise ValueError("name a --case, or run a --plan (see --help)")
    if args.op == "clip_qk_layernorm":
        norm = cases.make_norm(args.case, args.seqlen, args.dtype)
        prepare = lambda: measure.norm(norm, direction=args.direction, backend=args.backend)  # noqa: E731
        return plan.Entry(norm.name, prepare, rounds=args.rounds, memory=args.memory)
    case = cases.make(args.case, args.seqlen, mask=args.mask, prefix=args.prefix, batch=args.batch, dtype=args.dtype)
    prepare = lambda: measure.attention(  # noqa: E731
        case, direction=args.direction, backend=args.backend, peers=args.peers
    )
    return plan.Entry(f"{args.direction} {case.name}", prepare, rounds=args.rounds, memory=args.memory)


def measure_entries(entries: Iterable[plan.Entry], file: results.ResultFile) -> None:
    """Measures the entries in order; a failed gate stops the run, Ctrl-C keeps the rows so far."""
    entries = list(entries)
    progress = Progress([entry.name for entry in entries])
    try:
        for entry in entries:
            progress.start(entry.name)
            measurement = entry.prepare()
            measurement.rounds(entry.rounds)
            row = measurement.row(memory=entry.memory)
            file.add(row, entry.name, entry.study)
            progress.done(line(row))
    except KeyboardInterrupt:
        progress.close()
        print(f"interrupted: {len(file.rows)} of {len(entries)} measured", file=sys.stderr)
    progress.close()


def line(row: dict) -> str:
    """A row as one line of text."""
    own = row["ours"]
    name = f"{row.get('study', row['direction'])} {row['case']} {row['dtype']}"
    text = f"{name:<52} {own['median_ms']:>10.3f} ms ±{own['spread'] / 2:>4.0%}"
    if "gflops" in own:
        text += f" {own['gflops']:>7.0f} GFLOP/s"
    if "gbytes" in own:
        text += f" {own['gbytes']:>6.1f} GB/s"
    if "ceiling" in row:
        text += f"  {own['share_of_ceiling']:.2f} of {row['ceiling']['name']}"
    if "attention" in own:
        text += "  attention {share:.0%} of it, alone {share_predicted:.0%}".format(**own["attention"])
    if own.get("peak_mib") is not None:
        text += f"  peak {own['peak_mib']:.0f} MiB"
    for name, peer in row["peers"].items():
        text += f"  | {name} {peer['ratio']:.2f}x" if "ratio" in peer else f"  | {name}: {peer['skipped']}"
        if "attention_ratio" in peer:
            text += f" (attention {peer['attention_ratio']:.1f}x)"
        if "compile_s" in peer:
            text += f" (compiled in {peer['compile_s']:.0f} s)"
        if peer.get("peak_mib") is not None:
            text += f" ({peer['peak_mib']:.0f} MiB)"
    return text


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        if args.plan:
            entries = [
                e
                for e in plan.cpu_entries()
                if (e.core or args.plan == "full") and (not args.match or any(text in e.name for text in args.match))
            ]
        else:
            entries = [one_entry(args)]
    except ValueError as error:
        p.error(str(error))
    device = "cuda" if args.backend in ("cuda", "triton") else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        p.error(f"backend {args.backend} needs a GPU, and torch sees none")
    try:
        file = results.ResultFile(args.out, device, update=args.update)
    except ValueError as error:
        p.error(str(error))
    print(results.describe(file.data))
    file.data["ceilings"] = roofline.ceilings(device)
    print("ceilings  " + "  ".join(f"{name} {value:.1f}" for name, value in file.data["ceilings"].items()))
    try:
        measure_entries(entries, file)
        if args.plan:
            file.sort(entry.name for entry in plan.cpu_entries())
    except (gate.WrongResult, NotImplementedError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    if args.plan:
        file.data["targets"] = targets.judge(file.rows, device)
        file.write()
        print("\n".join(["", *targets.table(file.data["targets"])]))
    if args.out:
        print(f"wrote {args.out}; plots: python -m bench.report {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
