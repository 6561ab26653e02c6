"""What is measured: attention shapes of real models, their masks, and the useful work in them.

A case is a ``testing.Case`` under a name, so that the inputs, the correctness gate and the printed line that reruns a
case are those of the tests. Work is counted by ``semantics.py``: visible (query, key) pairs only.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from fractions import Fraction

import torch
from internvl_kernels import semantics
from internvl_kernels.testing import Case

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5  # matrix products per visible pair; two FLOPs per multiply-add


@dataclass(frozen=True)
class Model:
    """Attention of one layer of a model."""

    heads_q: int
    heads_kv: int
    head_dim: int
    alibi: str | None = None
    image_tokens: int = 0  # bidirectional keys before the prompt
    note: str = ""


MODELS = {
    "mpt-7b": Model(32, 32, 128, "mpt", note="MPT-7B: ALiBi"),
    "mpt-30b": Model(64, 64, 112, "mpt", note="MPT-30B: ALiBi, head dim 112"),
    "llava-7b": Model(32, 32, 128, None, 576, "LLaVA-1.5 7B: 576 image tokens"),
    "llava-13b": Model(40, 40, 128, None, 576, "LLaVA-1.5 13B: 576 image tokens"),
    "qllama": Model(32, 32, 128, None, 96, "Q-LLaMA of InternVL-14B: 96 query tokens"),
    "bloom-7b1": Model(32, 32, 128, "mpt", note="BLOOM-7B1: ALiBi"),
    "paligemma": Model(8, 1, 256, None, 256, "PaliGemma 3B: 256 image tokens, multi-query, head dim 256"),
    "alibi-d64": Model(16, 16, 64, "mpt", note="16 heads of 64, ALiBi"),
    "alibi-d80": Model(16, 16, 80, "mpt", note="16 heads of 80, ALiBi"),
    "alibi-d96": Model(16, 16, 96, "mpt", note="16 heads of 96, ALiBi"),
    "alibi-d112": Model(16, 16, 112, "mpt", note="16 heads of 112, ALiBi"),
    "alibi-d128": Model(16, 16, 128, "mpt", note="16 heads of 128, ALiBi"),
    "grouped-d128": Model(16, 4, 128, "mpt", note="16 query heads on 4 key heads of 128, ALiBi"),
    "multi-query-d128": Model(16, 1, 128, "mpt", note="16 query heads on one key head of 128, ALiBi"),
}
MASKS = ("prefix", "padded", "packed", "cross", "decode")


@dataclass(frozen=True)
class BenchCase:
    """A named call of ``prefix_attn``; hashable plain data."""

    name: str
    case: Case

    @property
    def visible_pairs(self) -> int:
        """Visible (query, key) pairs over the batch and all query heads."""
        return self.case.heads_q * _visible_pairs(dataclasses.replace(self.case, heads_q=1, heads_kv=1, alibi=None))

    def flops(self, direction: str) -> int:
        """Useful floating-point operations: 4 D per visible pair forward, 10 D backward."""
        products = FORWARD_PRODUCTS if direction == "forward" else BACKWARD_PRODUCTS
        return 2 * products * self.case.head_dim * self.visible_pairs

    def min_bytes(self, direction: str) -> int:
        """Every input read once, every result written once."""
        c = self.case
        size = c.torch_dtype.itemsize
        rows = c.batch * c.seqlen_q * c.heads_q * c.head_dim * size  # q, out and their gradients
        keys = c.batch * c.seqlen_k * c.heads_kv * c.head_dim * size
        lse = 4 * c.batch * c.seqlen_q * c.heads_q
        return 2 * rows + 2 * keys + lse if direction == "forward" else 4 * rows + 4 * keys + lse

    @property
    def kv_bytes(self) -> int:
        """The key and value cache: what decoding has to read."""
        c = self.case
        return 2 * c.batch * c.seqlen_k * c.heads_kv * c.head_dim * c.torch_dtype.itemsize


@functools.cache
def _visible_pairs(case: Case) -> int:
    return semantics.count_visible_pairs(case.seqlen_q, case.seqlen_k, batch=case.batch, **case.mask())


def dtype_name(dtype: torch.dtype | str) -> str:
    """``torch.bfloat16`` and "bfloat16" are "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def make(
    model: str,
    seqlen: int,
    *,
    mask: str = "prefix",
    prefix: str | int | Fraction | None = None,
    batch: int = 1,
    dtype: str = "float32",
) -> BenchCase:
    """The attention of ``model`` over ``seqlen`` keys.

    Args:
        model: a name of MODELS.
        seqlen: keys; queries too, except for "decode" (1 query) and "cross" (96 queries).
        mask: "prefix" (bidirectional prefix, causal rest), "padded" (the same, rows of unequal length, left padded),
            "packed" (documents in one row), "cross" (everything visible), "decode" (one new token).
        prefix: keys, or a fraction of ``seqlen`` such as "1/4" ("1/1": all). Default: the image tokens, else 1/4.
    Raises: ValueError for an unknown model or mask, or a prefix outside 0..seqlen.
    """
    if model not in MODELS:
        raise ValueError(f"case is {model!r}; allowed: {', '.join(MODELS)}")
    if mask not in MASKS:
        raise ValueError(f"mask is {mask!r}; allowed: {', '.join(MASKS)}")
    if seqlen < 1 or batch < 1:
        raise ValueError(f"seqlen is {seqlen} and batch is {batch}; allowed: positive numbers")
    shape = MODELS[model]
    keys = _prefix_keys(shape, seqlen, prefix)
    case = Case(
        batch=batch,
        seqlen_q={"decode": 1, "cross": min(96, seqlen)}.get(mask, seqlen),
        seqlen_k=seqlen,
        heads_q=shape.heads_q,
        heads_kv=shape.heads_kv,
        head_dim=shape.head_dim,
        dtype=dtype,
        alibi=shape.alibi,
        gradients="out",
    )
    ends = {"packed": None, "decode": None, "cross": (seqlen,) * batch}
    case = dataclasses.replace(case, prefix_len=ends.get(mask, (keys,) * batch))
    if mask == "padded":  # the last row is full; the others lose up to half
        starts = [seqlen * (batch - 1 - b) // (2 * batch) if batch > 1 else seqlen // 4 for b in range(batch)]
        prefixes = tuple(min(seqlen, start + keys) for start in starts)
        case = dataclasses.replace(case, key_range=tuple((s, seqlen) for s in starts), prefix_len=prefixes)
    if mask == "packed":
        case = dataclasses.replace(case, segments="packed")
    label = f"{model} {mask} S{seqlen}" + (f" B{batch}" if batch > 1 else "")
    if mask in ("prefix", "padded"):
        label += f" P{keys}"
    return BenchCase(label, case)


def _prefix_keys(shape: Model, seqlen: int, prefix: str | int | Fraction | None) -> int:
    if prefix is None:
        prefix = min(shape.image_tokens, seqlen) if shape.image_tokens else Fraction(1, 4)
    try:
        is_share = isinstance(prefix, Fraction) or "/" in str(prefix)
        keys = int(Fraction(prefix) * seqlen) if is_share else int(prefix)
    except (ValueError, ZeroDivisionError):
        keys = -1
    if not 0 <= keys <= seqlen:
        raise ValueError(f"prefix is {prefix}; allowed: 0 to {seqlen} keys, or a fraction such as 1/4")
    return keys


@dataclass(frozen=True)
class NormCase:
    """A call of ``clip_qk_layernorm`` on ``rows`` tokens of a model's fused projection."""

    name: str
    rows: int
    q_width: int
    k_width: int
    dtype: str

    def min_bytes(self, direction: str) -> int:
        """Forward: the projection in, q, k and v out. Backward: it and three gradients in, one out."""
        width = self.q_width + 2 * self.k_width
        return self.rows * width * getattr(torch, self.dtype).itemsize * (2 if direction == "forward" else 3)


NORMS = {
    "mpt-7b": (4096, 4096),
    "mpt-1b": (2048, 2048),
    "multi-query-2048": (2048, 128),
}


def make_norm(model: str, rows: int, dtype: str = "float32") -> NormCase:
    """QKV clip and QK LayerNorm of ``model`` over ``rows`` tokens."""
    if model not in NORMS:
        raise ValueError(f"case is {model!r}; allowed for clip_qk_layernorm: {', '.join(NORMS)}")
    q_width, k_width = NORMS[model]
    return NormCase(f"{model} rows {rows}", rows, q_width, k_width, dtype)
