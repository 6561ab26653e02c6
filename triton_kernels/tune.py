"""``python -m internvl_kernels.triton_kernels.tune``: measures candidate configurations on this machine's GPU.

Prints the time of every candidate, fastest first, and the rows for ``configs.TABLE``; ``--json FILE`` also writes all
measurements. Each candidate must pass the correctness gate's forward before it is timed. Without a GPU it says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator

import torch

from . import configs
from .configs import Config

SHAPES = {  # batch, seqlen_q, seqlen_k, heads_q, heads_kv
    "fwd": (4, 4096, 4096, 32, 8),
    "dkdv": (4, 4096, 4096, 32, 8),
    "dq": (4, 4096, 4096, 32, 8),
    "decode": (32, 1, 8192, 32, 8),
}
ROWS = {"fwd": (64, 128), "dkdv": (32, 64, 128), "dq": (32, 64, 128), "decode": (16, 32)}


def candidates(kernel: str, head_dim: int) -> Iterator[Config]:
    """Tile sizes, warps and stages worth a try."""
    keys = (16, 32, 64, 128) if head_dim > 128 else (32, 64, 128)
    for rows, columns, warps, stages in itertools.product(ROWS[kernel], keys, (4, 8), (1, 2, 3, 4)):
        if rows * columns <= 128 * 128 and (rows >= 64 or warps == 4):
            yield Config(rows, columns, warps, stages)


def inputs(kernel: str, dtype: torch.dtype, head_dim: int, alibi: bool) -> dict:
    """A prefix-LM call: a quarter of the keys is the prefix."""
    batch, seqlen_q, seqlen_k, heads_q, heads_kv = SHAPES[kernel]
    generator = torch.Generator("cuda").manual_seed(0)

    def rand(seqlen: int, heads: int):
        x = torch.randn(batch, seqlen, heads, head_dim, device="cuda", generator=generator)
        return x.to(dtype).requires_grad_(kernel in ("dkdv", "dq"))

    slopes = torch.logspace(-1, -8, heads_q, base=2.0, device="cuda") if alibi else None
    prefix = torch.full((batch,), seqlen_k // 4, dtype=torch.int32, device="cuda")
    tensors = {"q": rand(seqlen_q, heads_q), "k": rand(seqlen_k, heads_kv), "v": rand(seqlen_k, heads_kv)}
    return {**tensors, "prefix_len": prefix, "alibi_slopes": slopes}


def time_of(kernel: str, call: dict) -> float:
    """Milliseconds of the forward, or of the backward alone; the median of what Triton's timer collects."""
    import triton.testing

    from . import ops

    if kernel in ("fwd", "decode"):
        with torch.no_grad():
            return triton.testing.do_bench(lambda: ops.prefix_attn(**call), return_mode="median")
    out, _ = ops.prefix_attn(**call)
    leaves, grad = [call[n] for n in "qkv"], torch.randn_like(out)
    step = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)  # noqa: E731
    return triton.testing.do_bench(step, return_mode="median")


def is_right(call: dict) -> bool:
    """The forward agrees with the reference on the first batch row's first heads, within a coarse bound."""
    from .. import reference
    from . import ops

    group = call["q"].shape[2] // call["k"].shape[2]
    slopes = call["alibi_slopes"]
    part = {"q": call["q"][:1, :, :group], "k": call["k"][:1, :, :1], "v": call["v"][:1, :, :1]}
    part |= {"prefix_len": call["prefix_len"][:1], "alibi_slopes": None if slopes is None else slopes[:group]}
    with torch.no_grad():
        found, wanted = ops.prefix_attn(**part)[0], reference.prefix_attn(**part)[0]
    return bool(((found - wanted).abs() <= 0.02 + 0.02 * wanted.abs()).all())


def measure(kernel: str, dtype: torch.dtype, head_dim: int, alibi: bool) -> list[dict]:
    """Every candidate's time, fastest first; those that do not compile, launch or agree say why."""
    call = inputs(kernel, dtype, head_dim, alibi)
    (key, *_) = configs.gpu_keys("cuda", torch.cuda.current_device())
    row = (dtype.itemsize, next(step for step in configs.HEAD_DIM_STEPS if head_dim <= step))
    table = configs.TABLE.setdefault(key, {}).setdefault(kernel, {})
    before, found = table.get(row), []
    tried = list(candidates(kernel, head_dim))
    for number, config in enumerate(tried, 1):
        print(f"\r{kernel} {dtype} {head_dim}: {number}/{len(tried)}", end="", file=sys.stderr, flush=True)
        table[row] = config
        try:
            milliseconds, problem = (time_of(kernel, call), None) if is_right(call) else (None, "wrong result")
        except Exception as error:  # out of shared memory or registers: not a candidate on this GPU
            milliseconds, problem = (
                None,
                f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}",
            )
        found.append({**dataclasses.asdict(config), "ms": milliseconds, "problem": problem})
    print(file=sys.stderr)
    if before is None:
        del table[row]
    else:
        table[row] = before
    return sorted(found, key=lambda entry: (entry["ms"] is None, entry["ms"] or 0.0))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m internvl_kernels.triton_kernels.tune", description=__doc__)
    parser.add_argument("--kernel", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"])
    parser.add_argument("--no-alibi", action="store_true", help="without a bias, and so without distance pruning")
    parser.add_argument("--json", metavar="FILE", help="also write every measurement")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: no GPU here; configurations can only be measured on one", file=sys.stderr)
        return 1
    gpu, results = torch.cuda.get_device_name(), []
    print(f"{gpu}, torch {torch.__version__}")
    for kernel, name, head_dim in itertools.product(args.kernel, args.dtype, args.head_dim):
        dtype = getattr(torch, name)
        found = measure(kernel, dtype, head_dim, not args.no_alibi)
        results.append({"gpu": gpu, "kernel": kernel, "dtype": name, "head_dim": head_dim, "candidates": found})
        for entry in found[:10]:
            config = Config(*(entry[f.name] for f in dataclasses.fields(Config)))
            outcome = entry["problem"] or f"{entry['ms']:.4f} ms"
            print(f"{kernel:<7}{name:<10}{head_dim:>4}  {config}  {outcome}")
        best = found[0]
        if best["ms"] is not None:
            values = ", ".join(str(best[f.name]) for f in dataclasses.fields(Config))
            step = next(s for s in configs.HEAD_DIM_STEPS if head_dim <= s)
            print(f'    TABLE row of "{kernel}":  ({dtype.itemsize}, {step}): Config({values}),')
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
