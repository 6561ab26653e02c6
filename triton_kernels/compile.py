"""``python -m internvl_kernels.triton_kernels.compile``: every kernel and configuration, for real GPUs, without one.

Prints registers, spilled bytes, shared memory and the number of tensor-core and asynchronous-copy instructions of each.
Exits with 1 when a kernel that must be fast spills or lacks tensor-core instructions. Nothing is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import clip_qk_layernorm as norm
from . import configs, key_tiles, prefix_attn_bwd, prefix_attn_bwd_dq, prefix_attn_fwd
from .norm_launch import norm_tile

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Types of pointers that do not have the inputs' dtype.
POINTERS = {
    "lse": "fp32", "grad_lse": "fp32", "delta": "fp32", "norms": "fp32", "query_norm": "fp32", "query_lse": "fp32",
    "slopes": "fp32", "slope_shares": "fp32", "dslopes": "fp32", "shares": "fp32", "partial": "fp32",
    "partial_lse": "fp32", "statistics": "fp32", "sums": "fp32", "prefix_len": "i32", "key_range": "i32",
    "query_start": "i32", "segment_ids": "i32", "summary": "i32", "query_segments": "i64", "flags": "u8", "used": "u8",
}  # fmt: skip
FLOATS = ("softmax_scale", "clip", "eps")
SWITCHES = {
    "plain": {},
    "alibi": {"ALIBI": True, "PRUNE": True, "SLOPE_GRAD": True},
    "general": {"ALIBI": True, "PRUNE": True, "SLOPE_GRAD": True, "FLAGS": True, "SEGMENTS": True},
}
ATTENTION = {
    "fwd": prefix_attn_fwd.prefix_attn_fwd_kernel,
    "decode": prefix_attn_fwd.prefix_attn_fwd_kernel,
    "dkdv": prefix_attn_bwd.bwd_dkdv_kernel,
    "dq": prefix_attn_bwd_dq.bwd_dq_kernel,
}


@dataclasses.dataclass(frozen=True)
class Build:
    """One kernel with all its compile-time constants."""

    name: str
    kernel: object
    dtype: torch.dtype
    constants: dict
    options: dict
    products: bool = False  # it multiplies matrices, and must use tensor cores unless the dtype is fp32
    hot: bool = True  # it must not spill

    @property
    def title(self) -> str:
        """Name, dtype, and head dim where it has one."""
        return f"{self.name} {TYPES[self.dtype]} {self.constants.get('HEAD_DIM', '')}".rstrip()


def gpu_keys(target: GPUTarget) -> tuple[str, ...]:
    """Keys of the configuration tables for a target."""
    if target.backend == "hip":
        return (target.arch, "amd", "default")
    return (f"sm{target.arch}", "default")


def builds(keys: tuple[str, ...], reduced: bool) -> Iterator[Build]:
    """What to compile for a GPU; ``reduced``: the kernels of common models only."""
    dtypes = (torch.bfloat16,) if reduced else (torch.bfloat16, torch.float32)  # fp16 differs from bf16 in one opcode
    dims = (128,) if reduced else (64, 80, 128, 256)
    chunk = configs.of_gpu(configs.CHUNK, keys)
    for dtype in dtypes:
        for head_dim in dims:
            for role, kernel in ATTENTION.items():
                config = configs.attention(role, keys, dtype, head_dim)
                blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "CHUNK": chunk}
                dim = {"HEAD_DIM": head_dim, "BLOCK_D": configs.block_d(head_dim)}
                for switches in ("alibi",) if reduced else SWITCHES:
                    constants = {**dim, **blocks, "PACK": 8 if role == "decode" else 1, **SWITCHES[switches]}
                    constants["PRUNE"] = constants.get("PRUNE", False) and role != "decode"
                    hot = switches != "general" and dtype != torch.float32  # fp32 has no tensor cores to keep fed
                    name = f"{role} {switches}"
                    yield Build(name, kernel, dtype, constants, config.options, products=True, hot=hot)
            yield from _helpers(dtype, head_dim, keys)
        for widths in ((4096, 4096),) if reduced else ((4096, 4096), (8192, 1024), (768, 768)):
            yield from _norms(dtype, widths, keys)


def _helpers(dtype: torch.dtype, head_dim: int, keys: tuple[str, ...]) -> Iterator[Build]:
    dim, options = {"HEAD_DIM": head_dim, "BLOCK_D": configs.block_d(head_dim)}, {"num_warps": 4}
    config = configs.attention("fwd", keys, dtype, head_dim)
    both = {"FLAGS": True, "SEGMENTS": True}
    yield Build("combine", prefix_attn_fwd.combine_kernel, dtype, {**dim, "BLOCK_S": 32}, options)
    norms = {**dim, "BLOCK_N": config.block_n, **both}
    yield Build("key norms", key_tiles.key_norms_kernel, dtype, norms, options)
    stats = {**dim, "BLOCK_M": configs.attention("dkdv", keys, dtype, head_dim).block_m}
    stats |= {"GRAD_LSE": True, "PRUNE": True, "SEGMENTS": True}
    rows = {"num_warps": configs.row_warps(head_dim)}
    yield Build("preprocess", prefix_attn_bwd.bwd_preprocess_kernel, dtype, stats, rows)
    summary = {"BLOCK_N": config.block_n, "BLOCK_P": 64, **both}
    yield Build("key summary", key_tiles.key_summary_kernel, dtype, summary, options)
    yield Build("slopes", prefix_attn_bwd_dq.bwd_slopes_kernel, dtype, {"BLOCK": 256}, {"num_warps": 1})


def _norms(dtype: torch.dtype, widths: tuple[int, int], keys: tuple[str, ...]) -> Iterator[Build]:
    for name, kernel in (
        ("norm fwd", norm.clip_qk_layernorm_fwd_kernel),
        ("norm bwd", norm.clip_qk_layernorm_bwd_kernel),
    ):
        tile = norm_tile(keys, *widths, backward=name == "norm bwd")
        options = {"num_warps": tile.pop("num_warps")}
        switches = dict.fromkeys(("CLIP", "Q_NORM", "Q_BIAS", "K_NORM", "K_BIAS", "GRAD_Q", "GRAD_K", "GRAD_V"), True)
        constants = {"Q_WIDTH": widths[0], "K_WIDTH": widths[1], **tile, **switches}
        hot = dtype != torch.float32 or widths[0] <= 4096  # a wide fp32 row and its sums fill the registers
        yield Build(f"{name} {widths[0]}+{widths[1]}", kernel, dtype, constants, options, hot=hot)
    yield Build("norm reduce", norm.reduce_kernel, dtype, {"BLOCK": 64, "PROGRAMS": 16}, {"num_warps": 4})


def source(build: Build) -> ASTSource:
    """The kernel with its argument types, as a call with aligned tensors and even strides would specialise it."""
    signature, constants, divisible = {}, {}, []
    for name in build.kernel.arg_names:
        if name.isupper():
            constants[name] = build.constants.get(name, False)
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + POINTERS.get(name.removesuffix("_ptr"), TYPES[build.dtype])
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name.endswith("_ptr") or name.startswith("stride"):
            divisible.append(name)
    attributes = {(build.kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    return ASTSource(fn=build.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _tool(*names: str) -> str | None:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return next((str(folder / name) for name in names if (folder / name).exists()), None)


def _nvidia(compiled) -> dict[str, int]:
    ptx = compiled.asm["ptx"]
    usage = ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = _tool("cuobjdump")
        if tool:
            done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False)
            usage = done.stdout + done.stderr
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump reports no registers: {usage.strip() or 'the tool is missing'}")
    return {
        "regs": int(found[1]),
        "spill": int(found[2]),
        "tensor": len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
        "copies": len(re.findall(r"cp\.async\.c[ag]|cp\.async\.bulk", ptx)),
    }


def _amd(compiled) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    return {
        "regs": field("vgpr_count"),
        "spill": 4 * field("vgpr_spill_count"),
        "tensor": len(re.findall(r"v_(mfma|wmma|smfmac)_", text)),
        "copies": len(re.findall(r"(global_load|buffer_load)\w* .*\blds\b|global_load_lds|global_load_async", text)),
    }


def measure(build: Build, target: GPUTarget) -> dict[str, int]:
    """Compiles for the target; the numbers of the table."""
    compiled = triton.compile(source(build), target=target, options={**build.options, "enable_fp_fusion": True})
    row = _amd(compiled) if target.backend == "hip" else _nvidia(compiled)
    return {**row, "shared": compiled.metadata.shared}


def faults(build: Build, row: dict[str, int]) -> list[str]:
    """What must not be."""
    found = []
    if build.hot and row["spill"]:
        found.append(f"spills {row['spill']} bytes")
    if build.products and build.dtype != torch.float32 and not row["tensor"]:
        found.append("no tensor-core instruction")
    return found


def targets(names: list[str]) -> list[GPUTarget]:
    """80, 90, 100 are NVIDIA; gfx... is AMD."""
    return [GPUTarget("hip", n, 64) if n.startswith("gfx") else GPUTarget("cuda", int(n), 32) for n in names]


def _emits_amd() -> bool:
    from triton.backends import backends

    return "amd" in backends or "hip" in backends


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m internvl_kernels.triton_kernels.compile", description=__doc__)
    parser.add_argument("--arch", nargs="+", help="80 90 100 gfx942 gfx950 (default: all that this Triton emits)")
    parser.add_argument(
        "--reduced", action="store_true", help="bf16, head dim 128 with ALiBi, and the norm kernels only"
    )
    parser.add_argument("--match", help="only kernels whose name, dtype and head dim hold this text: 'fwd', 'bf16 256'")
    args = parser.parse_args(argv)
    names = args.arch or ["80", "90", "100"] + (["gfx942", "gfx950"] if _emits_amd() else [])
    jobs = [(t, b) for t in targets(names) for b in builds(gpu_keys(t), args.reduced) if (args.match or "") in b.title]
    if not jobs:
        parser.error(f"--match {args.match!r}: no kernel has that in its name")
    print(f"triton {triton.__version__}: {len(jobs)} kernels for {' '.join(names)}")
    print(f"{'arch':<7}{'kernel':<22}{'dtype':<6}{'dim':>4}{'tile':>9}{'warps':>6}{'stages':>7}", end="")
    print(f"{'regs':>6}{'spill':>7}{'shared':>8}{'tensor':>8}{'async':>7}")
    failed = 0
    for number, (target, build) in enumerate(jobs, 1):
        if sys.stderr.isatty():
            print(f"\r{number}/{len(jobs)} {target.arch} {build.name:<24}", end="\r", file=sys.stderr)
        try:
            row = measure(build, target)
            problems = faults(build, row)
        except Exception as error:  # the compiler's own: one kernel's failure is a line of the table
            row, problems = dict.fromkeys(("regs", "spill", "shared", "tensor", "copies"), 0), [_brief(error)]
        failed += bool(problems)
        c = build.constants
        tile = f"{c.get('BLOCK_M', c.get('ROWS', ''))}x{c.get('BLOCK_N', c.get('BLOCK_Q', ''))}".strip("x")
        print(f"{target.arch:<7}{build.name:<22}{TYPES[build.dtype]:<6}{c.get('HEAD_DIM', ''):>4}{tile:>9}", end="")
        print(f"{build.options['num_warps']:>6}{build.options.get('num_stages', '-'):>7}{row['regs']:>6}", end="")
        print(
            f"{row['spill']:>7}{row['shared']:>8}{row['tensor']:>8}{row['copies']:>7}  {'; '.join(problems)}",
            flush=True,
        )
    print(f"{failed} of {len(jobs)} fail" if failed else f"{len(jobs)} kernels compile, none spills where it must not")
    return bool(failed)


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:160] if lines else ''}"


if __name__ == "__main__":
    sys.exit(main())
