"""The attention of our models, exchanged for dense attention, left out, or recorded: every model calls one function."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator

import torch
from internvl_kernels import prefix_attention, semantics
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

CALLERS = ("hf_attention.attention", "mpt.fused", "qllama.layers", "qllama.masks", "internvl_14b.modeling_intern_vit")


@contextlib.contextmanager
def attention_is(attention: Callable[..., Tensor]) -> Iterator[None]:
    """Models call ``attention`` where they would call ``prefix_attention``."""
    modules = [importlib.import_module(f"internvl_kernels.models.{name}") for name in CALLERS]
    try:
        for module in modules:
            module.prefix_attention = attention
        yield
    finally:
        for module in modules:
            module.prefix_attention = prefix_attention


class Exchanged(nn.Module):
    """One of our models, parameters included, on another attention; ``make()`` gives that of one pass."""

    def __init__(self, module: nn.Module, make: Callable[[], Callable[..., Tensor]]) -> None:
        super().__init__()
        self.module, self.make = module, make

    def forward(self, *args, **kwargs):
        with attention_is(self.make()):
            return self.module(*args, **kwargs)


class Dense:
    """ "sdpa" or "eager" attention under a dense mask, which is built once in a pass and serves all layers."""

    def __init__(self, kind: str) -> None:
        self.kind, self.masks = kind, {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, **terms) -> Tensor:
        mask = self._mask(q, k, **terms)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.kind == "sdpa":
            grouped = q.shape[1] != k.shape[1]
            options = {"attn_mask": mask, "scale": softmax_scale, "enable_gqa": grouped}
            return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        weights = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32).to(q.dtype)
        return (weights @ v).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, prefix_len=None, key_range=None) -> Tensor | None:
        """[B, 1, Sq, Sk], additive; None when every query sees every key."""
        if isinstance(prefix_len, int):
            if prefix_len >= k.shape[1]:
                return None
            prefix_len = torch.full((q.shape[0],), prefix_len, dtype=torch.int32)
        named = [None if t is None else tuple(t.flatten().tolist()) for t in (prefix_len, key_range)]
        key = (q.shape[1], k.shape[1], *named)
        if key not in self.masks:
            sizes = (q.shape[0], q.shape[1], k.shape[1])
            seen = semantics.visible_mask(*sizes, prefix_len=prefix_len, key_range=key_range)
            self.masks[key] = torch.zeros((), dtype=q.dtype).masked_fill(~seen[:, None], torch.finfo(q.dtype).min)
        return self.masks[key]


def nothing(q: Tensor, k: Tensor, v: Tensor, **_terms) -> Tensor:
    """No attention: q plus k and v, or their means, so that a backward pass still reaches all three."""
    added = k + v if k.shape[1] == q.shape[1] else (k + v).mean(1, keepdim=True)
    return q + added.repeat_interleave(q.shape[2] // k.shape[2], 2)


class Recorded:
    """Passes calls on and keeps their arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Tensor, ...], dict]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **terms) -> Tensor:
        self.calls.append(((q.detach(), k.detach(), v.detach()), terms))
        return prefix_attention(q, k, v, **terms)


def alone(run: Callable[[], object], *, backward: bool) -> Callable[[], None]:
    """The attention calls that ``run()`` makes, as one call with nothing else in it; with their backward passes."""
    recorded = Recorded()
    with attention_is(recorded):
        run()

    def replay() -> None:
        for inputs, terms in recorded.calls:
            if not backward:
                with torch.no_grad():
                    prefix_attention(*inputs, **terms)
                continue
            leaves = [t.requires_grad_() for t in inputs]
            out = prefix_attention(*leaves, **terms)
            torch.autograd.grad(out, leaves, torch.ones_like(out))

    return replay
