"""What the package set out to reach, as data: each target looks at the rows of one run and says what was found.

All figures are ratios within one run. A target without a row is "not measured", never "met".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .cases import MODELS
from .results import ANCHOR

Rows = list[dict]


@dataclass(frozen=True)
class Target:
    """``find(rows)``: (value, case) per measured row; the worst one counts."""

    where: str
    what: str
    than: str
    bound: float
    find: Callable[[Rows], list[tuple[float, str]]]
    at_most: bool = False

    def judge(self, rows: Rows) -> dict:
        """The worst value, its case and the verdict: met, missed or not measured."""
        found = self.find(rows)
        plain = {"where": self.where, "what": self.what, "than": self.than, "bound": self.bound}
        plain["relation"] = "<=" if self.at_most else ">="
        if not found:
            return {**plain, "verdict": "not measured"}
        value, case = (max if self.at_most else min)(found)
        met = value <= self.bound if self.at_most else value >= self.bound
        return {**plain, "value": value, "case": case, "verdict": "met" if met else "missed"}


def _rows(rows: Rows, device: str, direction: str, **facts) -> Rows:
    def matches(row: dict) -> bool:
        on_gpu = row["backend"] in ("cuda", "triton")
        return (
            on_gpu == (device == "gpu")
            and row["direction"] == direction
            and all(row.get(name) == value for name, value in facts.items())
        )

    return [row for row in rows if matches(row)]


def _stated(row: dict) -> bool:
    """Was the row measured under the conditions of the targets: self-attention, ALiBi, a prefix of a quarter?"""
    if row["op"] != "prefix_attn" or "study" in row:
        return False
    model, *words = row["case"].split()
    _, seqlen_q, seqlen_k, *_ = row["shape"]
    return (
        model in MODELS
        and bool(MODELS[model].alibi)
        and {"prefix", f"P{seqlen_k // 4}"} <= set(words)
        and seqlen_q == seqlen_k
    )


def _share(
    device: str, direction: str, dtype: str, *, shortest: int, backend: str | None = None, dim: int | None = None
):
    def find(rows: Rows) -> list[tuple[float, str]]:
        return [
            (row["ours"]["share_of_ceiling"], row["case"])
            for row in _rows(rows, device, direction, dtype=dtype, op="prefix_attn")
            if _stated(row)
            and row["shape"][1] >= shortest
            and "share_of_ceiling" in row["ours"]
            and (dim is None or row["shape"][5] == dim)
            and (backend is None or row["backend"] == backend)
        ]

    return find


def _over(peer: str, device: str, direction: str, dtype: str, *, lengths=range(1024, 1 << 30), **more):
    backend, dim = more.get("backend"), more.get("dim")

    def find(rows: Rows) -> list[tuple[float, str]]:
        return [
            (row["peers"][peer]["ratio"], row["case"])
            for row in _rows(rows, device, direction, dtype=dtype, op="prefix_attn")
            if _stated(row)
            and row["shape"][1] in lengths
            and "ratio" in row["peers"].get(peer, {})
            and (dim is None or row["shape"][5] == dim)
            and (backend is None or row["backend"] == backend)
        ]

    return find


def _decode_share(device: str, *, longest_cache_only: bool = True, smallest_batch: int = 1, backend: str | None = None):
    def find(rows: Rows) -> list[tuple[float, str]]:
        return [
            (row["ours"]["share_of_ceiling"], row["case"])
            for row in _rows(rows, device, "forward", op="prefix_attn")
            if row["shape"][1] == 1
            and row["shape"][0] >= smallest_batch
            and row["shape"][3] == row["shape"][4]  # multi-head: bandwidth, not arithmetic, is the bound
            and (not longest_cache_only or row["shape"][2] >= 32768)
            and (backend is None or row["backend"] == backend)
        ]

    return find


def _decode_multi_query(rows: Rows) -> list[tuple[float, str]]:
    return [
        (row["peers"]["sdpa-packed"]["ratio"], row["case"])
        for row in _rows(rows, "cpu", "forward", dtype="bfloat16", op="prefix_attn")
        if row["shape"][1] == 1 and row["shape"][4] == 1 and "ratio" in row["peers"].get("sdpa-packed", {})
    ]


def _pruning(rows: Rows) -> list[tuple[float, str]]:
    return [(row["peers"]["unpruned"]["ratio"], row["case"]) for row in rows if row.get("study") == "pruning"]


def _norm_share(device: str, direction: str, **facts):
    def find(rows: Rows) -> list[tuple[float, str]]:
        found = _rows(rows, device, direction, op="clip_qk_layernorm", **facts)
        return [(row["ours"]["share_of_ceiling"], f"{row['case']} {row['dtype']}") for row in found]

    return find


def _growth(rows: Rows) -> list[tuple[float, str]]:
    """Largest over smallest time per visible pair between 1k and 16k, pruning off, each over that of the anchor."""
    per_pair = {
        row["shape"][1]: 1 / row["peers"][ANCHOR]["ratio"]
        for row in rows
        if row.get("study") == "growth" and 1024 <= row["shape"][1] <= 16384 and ANCHOR in row["peers"]
    }
    if len(per_pair) < 2:
        return []
    slow, fast = max(per_pair, key=per_pair.get), min(per_pair, key=per_pair.get)
    return [(per_pair[slow] / per_pair[fast], f"S {slow} against S {fast}")]


def _odd_dims(rows: Rows) -> list[tuple[float, str]]:
    """Rate of head dims 80 and 112 over the slower of their neighbours."""
    rate = {row["shape"][5]: row["ours"]["gflops"] for row in rows if row.get("study") == "head dims"}
    neighbours = {80: (64, 96), 112: (96, 128)}
    return [
        (rate[dim] / min(rate[n] for n in near), f"head dim {dim}")
        for dim, near in neighbours.items()
        if dim in rate and all(n in rate for n in near)
    ]


def _prefix_lm_attention(rows: Rows) -> list[tuple[float, str]]:
    """The attention part of converted models over that of SDPA with a dense prefix mask."""
    return [
        (row["peers"]["sdpa"]["attention_ratio"], f"{row['case']} {row['direction']}")
        for row in rows
        if row["op"] == "model"
        and row["case"].startswith("model prefix-")
        and row["dtype"] == "float32"
        and "attention_ratio" in row["peers"].get("sdpa", {})
    ]


def _model_decode(rows: Rows) -> list[tuple[float, str]]:
    """32 tokens after a long prompt: transformers' LLaMA with SDPA, its MPT, and LLaVA over both."""
    found = []
    for row in rows:
        if row["op"] == "model" and row["direction"] == "decode":
            ratios = [row["peers"][peer]["ratio"] for peer in ("sdpa", "hf") if peer in row["peers"]]
            found += [(ratio, f"{row['case']} {row['dtype']}") for ratio in ratios]
    return found


CPU_TARGETS = (
    Target("CPU, S >= 1k", "forward fp32", "torch.mm", 0.85, _share("cpu", "forward", "float32", shortest=1024)),
    Target("CPU, S >= 1k", "forward fp32", "SDPA with bias", 2.0, _over("sdpa", "cpu", "forward", "float32")),
    Target("CPU, S >= 1k", "forward fp32", "FlexAttention", 1.5, _over("flex", "cpu", "forward", "float32")),
    Target(
        "CPU, S >= 1k",
        "forward bf16",
        "torch.mm, best dtype",
        0.75,
        _share("cpu", "forward", "bfloat16", shortest=1024),
    ),
    Target("CPU, S >= 1k", "forward bf16", "SDPA with bias", 3.5, _over("sdpa", "cpu", "forward", "bfloat16")),
    Target("CPU, S >= 1k", "forward bf16", "FlexAttention", 3.5, _over("flex", "cpu", "forward", "bfloat16")),
    Target("CPU, S >= 1k", "backward fp32", "torch.mm", 0.8, _share("cpu", "backward", "float32", shortest=1024)),
    Target(
        "CPU, S >= 1k",
        "backward bf16",
        "torch.mm, best dtype",
        0.6,
        _share("cpu", "backward", "bfloat16", shortest=1024),
    ),
    Target(
        "CPU, S = 512, D = 128",
        "forward bf16",
        "eager",
        1.5,
        _over("eager", "cpu", "forward", "bfloat16", lengths=(512,), dim=128),
    ),
    Target("CPU, 32k keys", "decode, multi-head", "read bandwidth", 0.8, _decode_share("cpu")),
    Target("CPU, 32k keys", "decode, multi-query bf16", "packed SDPA", 5.0, _decode_multi_query),
    Target("CPU, S = 8k, 16 heads", "ALiBi pruning", "without it", 2.0, _pruning),
    Target("CPU, 1k to 16k", "time per visible pair", "the fastest length", 1.10, _growth, at_most=True),
    Target("CPU, S = 2k", "attention of prefix LMs", "SDPA, dense mask", 1.5, _prefix_lm_attention),
    Target("CPU, 2k prompt", "32 tokens of a model", "transformers", 1.0, _model_decode),
    Target("CPU", "head dims 80 and 112", "their neighbours", 0.85, _odd_dims),
    Target("CPU", "clip + QK LayerNorm forward", "copy bandwidth", 0.9, _norm_share("cpu", "forward")),
    Target("CPU", "clip + QK LayerNorm backward", "copy bandwidth", 0.85, _norm_share("cpu", "backward")),
)
GPU_TARGETS = (
    Target(
        "GPU",
        "forward bf16 D128, cuda",
        "FlexAttention",
        1.5,
        _over("flex", "gpu", "forward", "bfloat16", backend="cuda", dim=128),
    ),
    Target(
        "GPU",
        "forward bf16, cuda",
        "SDPA FLASH per pair",
        1.0,
        _over("flash-causal", "gpu", "forward", "bfloat16", backend="cuda"),
    ),
    Target(
        "GPU",
        "backward bf16, cuda",
        "SDPA FLASH per pair",
        1.0,
        _over("flash-causal", "gpu", "backward", "bfloat16", backend="cuda"),
    ),
    Target(
        "GPU",
        "forward bf16 D128, triton",
        "FlexAttention",
        1.2,
        _over("flex", "gpu", "forward", "bfloat16", backend="triton", dim=128),
    ),
    Target(
        "GPU",
        "backward bf16 D128, triton",
        "FlexAttention",
        1.2,
        _over("flex", "gpu", "backward", "bfloat16", backend="triton", dim=128),
    ),
    Target(
        "GPU, B >= 32",
        "decode, cuda",
        "copy bandwidth",
        0.85,
        _decode_share("gpu", longest_cache_only=False, smallest_batch=32, backend="cuda"),
    ),
    Target("GPU", "clip + QK LN forward, cuda", "copy bandwidth", 0.9, _norm_share("gpu", "forward", backend="cuda")),
    Target(
        "GPU", "clip + QK LN backward, cuda", "copy bandwidth", 0.85, _norm_share("gpu", "backward", backend="cuda")
    ),
)


def judge(rows: Rows, device: str = "cpu") -> list[dict]:
    """Every target of the device against the rows of one run."""
    return [target.judge(rows) for target in (GPU_TARGETS if device == "cuda" else CPU_TARGETS)]


def table(verdicts: list[dict]) -> list[str]:
    """The verdicts as lines of a terminal table."""
    lines = [f"{'where':<22} {'what':<30} {'over':<22} {'target':>8} {'found':>7}  verdict"]
    for v in verdicts:
        found = f"{v['value']:.2f}" if "value" in v else ""
        verdict = v["verdict"] + (f" ({v['case']})" if v["verdict"] == "missed" else "")
        bound = f"{v['relation']} {v['bound']:g}"
        lines.append(f"{v['where']:<22} {v['what']:<30} {v['than']:<22} {bound:>8} {found:>7}  {verdict}")
    return lines
