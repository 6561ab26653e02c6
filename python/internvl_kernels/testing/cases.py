"""Cases as plain data, the inputs they stand for, and where cases come from: a fixed list and a seed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import semantics


@dataclass(frozen=True, repr=False)
class Case:
    """One call of ``prefix_attn``: shapes, mask data and the recipe of its random inputs."""

    batch: int = 1
    seqlen_q: int = 16
    seqlen_k: int = 16
    heads_q: int = 2
    heads_kv: int = 2
    head_dim: int = 16
    dtype: str = "float32"
    prefix_len: tuple[int, ...] | None = None
    key_range: tuple[tuple[int, int], ...] | None = None
    query_start: tuple[int, ...] | None = None
    key_flags: str | None = None  # "random", "prefix", "holes" or "none"
    segments: str | None = None  # "packed", "interleaved" or "own"
    alibi: str | None = None  # "mpt", "random", "negative", "zero" or "steep"
    window: int = 0
    softmax_scale: float | None = None
    layout: str = "plain"  # "plain", "fused", "bhsd", "offset" or "expanded"
    gradients: str = "both"  # through "both", "out" or "lse"
    seed: int = 0

    def __repr__(self) -> str:
        changed = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        )
        return f"Case({', '.join(changed)})"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k and v."""
        return getattr(torch, self.dtype)

    def mask(self) -> dict[str, Tensor | int | None]:
        """The mask arguments of the operator, as ``semantics.visible_mask`` takes them."""

        def ints(values: Sequence | None) -> Tensor | None:
            return None if values is None else torch.tensor(values, dtype=torch.int32)

        return {
            "prefix_len": ints(self.prefix_len),
            "key_range": ints(self.key_range),
            "query_start": ints(self.query_start),
            "key_flags": _key_flags(self),
            "segment_ids": _segment_ids(self),
            "window": self.window,
        }

    def slopes(self) -> Tensor | None:
        """fp32 [heads_q], or None."""
        h = self.heads_q
        kinds = {
            "mpt": lambda: semantics.mpt_alibi_slopes(h),
            "random": lambda: torch.rand(h, generator=_generator(self, 1)),
            "negative": lambda: -semantics.mpt_alibi_slopes(h) / 8,
            "zero": lambda: torch.zeros(h),
            "steep": lambda: torch.full((h,), 1e4),
        }
        return kinds[self.alibi]() if self.alibi else None


@dataclass
class Inputs:
    """Tensors of a case. NaN stands wherever it must not matter."""

    q: Tensor
    k: Tensor
    v: Tensor
    alibi_slopes: Tensor | None
    softmax_scale: float | None
    mask: dict[str, Tensor | int | None]
    grad_out: Tensor  # zero where no gradient comes from
    grad_lse: Tensor

    def to(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Inputs:
        """Copies in ``dtype``; mask tensors keep theirs, slopes and lse leave fp32 for float64 only."""
        wide = torch.float64 if dtype is torch.float64 else None

        def move(x, new_dtype=None):
            return x.to(device, new_dtype) if isinstance(x, Tensor) else x

        return Inputs(
            *(move(t, dtype) for t in (self.q, self.k, self.v)),
            move(self.alibi_slopes, wide),
            self.softmax_scale,
            {name: move(value) for name, value in self.mask.items()},
            move(self.grad_out, dtype),
            move(self.grad_lse, wide),
        )

    def visible(self) -> Tensor:
        """The mask as bool [B, Sq, Sk]."""
        return semantics.visible_mask(self.q.shape[0], self.q.shape[1], self.k.shape[1], **self.mask)


def _generator(case: Case, salt: int) -> torch.Generator:
    return torch.Generator().manual_seed(case.seed * 1000 + salt)


def _key_flags(case: Case) -> Tensor | None:
    if case.key_flags is None:
        return None
    shape, generator = (case.batch, case.seqlen_k), _generator(case, 2)
    j = torch.arange(case.seqlen_k)
    if case.key_flags == "random":
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)  # unused bits must not matter
    if case.key_flags == "prefix":
        flags = 1 + 2 * (j < case.seqlen_k // 2).expand(shape)
    elif case.key_flags == "holes":  # nearly all valid, with bidirectional islands
        flags = (torch.rand(shape, generator=generator) > 0.1) * 1 + 2 * (j // 20 % 3 == 1)
    else:
        flags = torch.full(shape, semantics.FLAG_BIDIRECTIONAL)
    return flags.to(torch.uint8)


def _segment_ids(case: Case) -> Tensor | None:
    if case.segments is None:
        return None
    shape = (case.batch, case.seqlen_k)
    if case.segments == "own":
        return torch.arange(case.seqlen_k, dtype=torch.int32).expand(shape)
    ids = torch.randint(-1, 3, shape, generator=_generator(case, 3), dtype=torch.int32)
    return ids.sort(1).values if case.segments == "packed" else ids


def _heads(case: Case, seqlen: int, heads: int, salt: int) -> Tensor:
    """A random [B, S, H, D] tensor in the memory layout that the case asks for."""
    b, d = case.batch, case.head_dim

    def fill(*shape):
        return torch.randn(shape, generator=_generator(case, salt)).to(case.torch_dtype)

    if case.layout == "fused":
        return fill(b, seqlen, 3 * heads * d)[..., heads * d : 2 * heads * d].unflatten(-1, (heads, d))
    if case.layout == "bhsd":
        return fill(b, heads, seqlen, d).transpose(1, 2)
    if case.layout == "offset":  # an odd start and odd row lengths: nothing is aligned
        return fill(1 + b * seqlen * heads * (d + 1))[1:].view(b, seqlen, heads, d + 1)[..., :d]
    if case.layout == "expanded":
        return fill(b, seqlen, 1, d).expand(b, seqlen, heads, d)
    return fill(b, seqlen, heads, d)


def build(case: Case, *, poison: bool = True) -> Inputs:
    """The inputs of a case, the same at every call.

    ``poison`` puts NaN where it must not matter; that looks at the dense mask, which long sequences cannot afford.
    """
    sizes = ((case.seqlen_q, case.heads_q), (case.seqlen_k, case.heads_kv), (case.seqlen_k, case.heads_kv))
    q, k, v = (_heads(case, *size, salt) for salt, size in enumerate(sizes, 10))
    inputs = Inputs(
        q,
        k,
        v,
        case.slopes(),
        case.softmax_scale,
        case.mask(),
        (torch.randn(q.shape, generator=_generator(case, 20)) * (case.gradients != "lse")).to(case.torch_dtype),
        torch.randn(q.shape[0], q.shape[2], q.shape[1], generator=_generator(case, 21)) * (case.gradients != "out"),
    )
    if not poison:
        return inputs
    seen = inputs.visible()
    for tensor, unused in ((q, ~seen.any(2)), (k, ~seen.any(1)), (v, ~seen.any(1))):
        if case.layout == "expanded":  # the heads share one memory
            tensor = tensor[:, :, :1]
        tensor.masked_fill_(unused[:, :, None, None], torch.nan)
    return inputs


LENGTHS = (1, 2, 7, 31, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 200, 257, 300)  # tile sizes and beside
HEAD_DIMS = (1, 3, 8, 16, 17, 31, 64, 80, 96, 112, 128, 200, 256)
DTYPES = ("float32", "bfloat16", "float16")


def random_case(seed: int) -> Case:
    """A case drawn from everything the operator takes; the same for the same seed."""
    rng = random.Random(seed)

    def maybe(chance: float, value):
        return value() if rng.random() < chance else None

    batch, heads_kv = rng.choice((1, 1, 2, 3)), rng.choice((1, 2, 3))
    seqlen_k = rng.choice(LENGTHS)
    seqlen_q = rng.choice((1, 2, 4, 5, seqlen_k, seqlen_k, seqlen_k, rng.choice(LENGTHS)))
    start = [rng.randint(0, seqlen_k + 2) for _ in range(batch)]
    form = rng.choice(("causal", "prefix", "range", "both", "flags"))
    return Case(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads_q=heads_kv * rng.choice((1, 1, 2, 5)),
        heads_kv=heads_kv,
        head_dim=rng.choice(HEAD_DIMS),
        dtype=rng.choice(("float32", *DTYPES)),
        prefix_len=tuple(rng.randint(-2, seqlen_k + 5) for _ in start) if form in ("prefix", "both") else None,
        key_range=tuple((s, s + rng.randint(0, seqlen_k)) for s in start) if form in ("range", "both") else None,
        query_start=maybe(0.3, lambda: tuple(rng.randint(-9, seqlen_k + 9) for _ in start)),
        key_flags=rng.choice(("random", "prefix", "holes", "holes", "none")) if form == "flags" else None,
        segments=maybe(0.3, lambda: rng.choice(("packed", "packed", "interleaved", "own"))),
        alibi=maybe(0.6, lambda: rng.choice(("mpt", "random", "negative", "zero", "steep"))),
        window=maybe(0.3, lambda: rng.choice((1, 2, 17, 100))) or 0,
        softmax_scale=maybe(0.3, lambda: rng.choice((0.5, -0.3, 0.0, 2.0))),
        layout=rng.choice(("plain", "plain", "fused", "bhsd", "offset", "expanded")),
        gradients=rng.choice(("both", "both", "out", "lse")),
        seed=seed,
    )


def structured_cases() -> dict[str, Case]:
    """One case per feature and per pair of features that meet in a kernel, by name. All are small."""
    base = Case(batch=2, seqlen_q=130, seqlen_k=130, heads_q=4, heads_kv=2, head_dim=16)

    def vary(**changes) -> Case:
        return dataclasses.replace(base, **changes)

    cases = {
        "causal": vary(),
        "full": vary(prefix_len=(130, 999)),
        "prefix": vary(prefix_len=(40, 97)),
        "prefix-none": vary(prefix_len=(0, -3)),
        "range-left": vary(key_range=((20, 130), (96, 130))),
        "range-right": vary(key_range=((0, 100), (0, 64))),
        "range-empty": vary(key_range=((50, 50), (3, 127))),
        "range-beyond": vary(key_range=((129, 500), (200, 300))),
        "prefix-range": vary(prefix_len=(60, 130), key_range=((10, 120), (70, 110))),
        "start": vary(query_start=(-7, 60), prefix_len=(30, 0)),
        "flags-random": vary(key_flags="random"),
        "flags-prefix": vary(key_flags="prefix"),
        "flags-holes": vary(key_flags="holes"),
        "flags-none": vary(key_flags="none"),
        "segments-packed": vary(segments="packed"),
        "segments-interleaved": vary(segments="interleaved", prefix_len=(50, 9)),
        "segments-flags": vary(segments="packed", key_flags="holes"),
        "segments-outside": vary(segments="packed", query_start=(-20, 80), prefix_len=(30, 130)),
        "window": vary(window=17),
        "window-prefix-range": vary(window=40, prefix_len=(10, 100), key_range=((5, 125), (0, 130))),
        "window-flags": vary(window=9, key_flags="holes"),
        "alibi": vary(alibi="mpt"),
        "alibi-prefix": vary(alibi="random", prefix_len=(33, 128)),
        "alibi-full-start": vary(alibi="mpt", prefix_len=(130, 130), query_start=(64, -64)),
        "alibi-flags-segments": vary(alibi="random", key_flags="holes", segments="packed"),
        "alibi-negative": vary(alibi="negative", prefix_len=(64, 20)),
        "alibi-window": vary(alibi="mpt", window=33),
        "scale-zero": vary(softmax_scale=0.0, alibi="mpt"),
        "scale-negative": vary(softmax_scale=-0.3),
        "scale-large": vary(softmax_scale=3.0),
        "multi-head": vary(heads_kv=4, alibi="mpt", prefix_len=(20, 50)),
        "multi-query": vary(heads_kv=1, heads_q=6, alibi="mpt", prefix_len=(20, 50)),
        "more-queries": vary(seqlen_q=200, prefix_len=(20, 50)),
        "decode": vary(seqlen_q=1, seqlen_k=700, alibi="mpt", key_range=((0, 513), (130, 700))),
        "decode-grouped": vary(seqlen_q=3, seqlen_k=1100, heads_q=10, alibi="mpt", query_start=(600, 1000)),
        "lse-gradient": vary(gradients="lse", alibi="random"),
        "out-gradient": vary(gradients="out", alibi="random"),
    }
    return {name: dataclasses.replace(case, seed=n) for n, (name, case) in enumerate(cases.items())}
