"""What a user would pick instead. A peer answers ``reasons``; an absent or refused one says why in the table.

Masks and biases are built once, outside the timing: what is compared is attention itself, in the peers' favour.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from internvl_kernels import semantics
from internvl_kernels.testing import Inputs
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

DENSE_LIMIT = {"cpu": 3 << 30, "cuda": 24 << 30}  # bytes of one dense bias
EAGER_TENSORS = 3  # scores, probabilities, and one of them in flight


@dataclass(frozen=True)
class Peer:
    """``reasons(inputs, direction)``: why it cannot take this call. ``prepare(inputs)``: the forward as a callable."""

    name: str
    reasons: Callable[[Inputs, str], list[str]]
    prepare: Callable[[Inputs], Callable[..., Tensor]]
    compiles: bool = False
    causal_only: bool = False  # measures a plain causal call: only its rate per visible pair can be compared


def dense_bias(inputs: Inputs) -> Tensor:
    """Mask and ALiBi as one additive tensor [B, H or 1, Sq, Sk] in the dtype of q."""
    q, k = inputs.q, inputs.k
    seen = semantics.visible_mask(q.shape[0], q.shape[1], k.shape[1], device=q.device, **inputs.mask)
    if inputs.alibi_slopes is None:
        bias = torch.zeros((), device=q.device, dtype=q.dtype).expand(seen[:, None].shape)
    else:
        p = semantics.positions(q.shape[0], q.shape[1], k.shape[1], inputs.mask["query_start"], q.device)
        bias = semantics.bias_matrix(inputs.alibi_slopes, p, k.shape[1]).to(q.dtype)
    # A row without a visible key would be NaN in every peer; it is padding, and is given all keys instead.
    seen = seen | ~seen.any(-1, keepdim=True)
    return bias.masked_fill(~seen[:, None], -torch.inf)


def _dense_reasons(inputs: Inputs, tensors: int = 1) -> list[str]:
    (batch, seqlen_q, heads, _), seqlen_k = inputs.q.shape, inputs.k.shape[1]
    nbytes = tensors * batch * heads * seqlen_q * seqlen_k * inputs.q.dtype.itemsize
    limit = DENSE_LIMIT[inputs.q.device.type]
    what = "its dense bias" if tensors == 1 else "its scores"
    return [f"{what} would take {nbytes / 2**30:.0f} GiB"] if nbytes > limit else []


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def _sdpa_of(backend: str | None) -> Callable[[Inputs], Callable[..., Tensor]]:
    def prepare(inputs: Inputs) -> Callable[..., Tensor]:
        bias = dense_bias(inputs)
        grouped = inputs.q.shape[2] != inputs.k.shape[2]

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = _heads_first(q, k, v)
            if grouped and backend not in (None, "MATH"):  # those kernels take one key head per query head
                k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
            enable = q.shape[1] != k.shape[1]
            return scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=enable).transpose(1, 2)

        return call if backend is None else _under(backend, call)

    return prepare


def _under(backend: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(*tensors: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return call(*tensors)

    return run


def _sdpa_packed(inputs: Inputs) -> Callable[..., Tensor]:
    """Decoding done by hand: the query heads of a key head become rows, so that the cache is read once."""
    bias = dense_bias(inputs).expand(-1, inputs.q.shape[2], -1, -1)
    batch, heads, _, seqlen_k = bias.shape
    bias = bias.reshape(batch, inputs.k.shape[2], -1, seqlen_k)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.view(batch, k.shape[2], -1, q.shape[-1])
        out = scaled_dot_product_attention(rows, *_heads_first(k, v), attn_mask=bias)
        return out.reshape(batch, 1, heads, -1)

    return call


def _single_query(inputs: Inputs, _direction: str) -> list[str]:
    return [] if inputs.q.shape[1] == 1 else ["packs the heads of one query only"]


def _eager(inputs: Inputs) -> Callable[..., Tensor]:
    bias, scale = dense_bias(inputs), inputs.q.shape[-1] ** -0.5
    group = inputs.q.shape[2] // inputs.k.shape[2]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(group, 2) if group > 1 else t for t in (k, v))
        q, k, v = _heads_first(q, k, v)
        return (((q @ k.mT) * scale + bias).softmax(-1) @ v).transpose(1, 2)

    return call


def _flex(inputs: Inputs) -> Callable[..., Tensor]:
    """FlexAttention, compiled: the package's own mask predicate as mask_mod, ALiBi as score_mod."""
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # every case is compiled anew; after some eight, torch would go on without compiling
    torch._functorch.config.donated_buffer = False  # a timed backward runs many times on the tensors of one forward

    (batch, seqlen_q, heads, _), seqlen_k = inputs.q.shape, inputs.k.shape[1]
    mask, device = inputs.mask, inputs.q.device
    first = seqlen_k - seqlen_q
    everything = torch.tensor([[0, seqlen_k]], device=device).expand(batch, 2)
    key_range = everything if mask["key_range"] is None else mask["key_range"]
    prefix = torch.zeros(batch, device=device) if mask["prefix_len"] is None else mask["prefix_len"]
    segments = mask["segment_ids"]

    def mask_mod(b, _h, i, j):
        p = semantics.query_position(first, i)
        same = True if segments is None else segments[b, p] == segments[b, j]
        valid = semantics.valid_in_range(j, key_range[b, 0], key_range[b, 1])
        open_key = semantics.bidirectional_in_prefix(j, prefix[b])
        return semantics.visible(valid, same, open_key, semantics.causal(p, j, torch.tensor(0, device=device)))

    slopes = inputs.alibi_slopes

    def score_mod(score, _b, h, i, j):
        return score + semantics.alibi_bias(slopes[h], semantics.query_position(first, i), j)

    block_mask = create_block_mask(mask_mod, batch, None, seqlen_q, seqlen_k, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = heads != inputs.k.shape[2]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = _heads_first(q, k, v)
        score = None if slopes is None else score_mod
        return compiled(q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)

    return call


def _flex_reasons(inputs: Inputs, direction: str) -> list[str]:
    reasons = []
    if inputs.q.device.type == "cpu" and direction == "backward":
        reasons.append("FlexAttention has no backward on the CPU")
    if inputs.mask["key_flags"] is not None or inputs.mask["query_start"] is not None or inputs.mask["window"]:
        reasons.append("this benchmark builds no mask_mod for flags, windows or moved queries")
    return reasons


def _flash_attn(inputs: Inputs) -> Callable[..., Tensor]:
    from flash_attn import flash_attn_func

    slopes = inputs.alibi_slopes
    return lambda q, k, v: flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)


def _xformers(inputs: Inputs) -> Callable[..., Tensor]:
    from xformers.ops import memory_efficient_attention

    bias = dense_bias(inputs).expand(-1, inputs.q.shape[2], -1, -1)
    return lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=bias)


def _sdpa_causal(backend: str) -> Callable[[Inputs], Callable[..., Tensor]]:
    def prepare(_inputs: Inputs) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = _heads_first(q, k, v)
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(
                1, 2
            )

        return _under(backend, call)

    return prepare


def _needs(*, module: str | None = None, cuda: bool = False, square: bool = False, dense: int = 0):
    """Reasons from what a peer needs: an installed module, a GPU, as many queries as keys, dense memory."""

    def reasons(inputs: Inputs, _direction: str) -> list[str]:
        found = []
        if module and importlib.util.find_spec(module) is None:
            found.append(f"{module} is not installed")
        if cuda and inputs.q.device.type != "cuda":
            found.append("needs a GPU")
        if cuda and inputs.q.dtype is torch.float32:
            found.append("takes no fp32")
        if square and inputs.q.shape[1] != inputs.k.shape[1]:
            found.append("a causal call needs as many queries as keys")
        return found + (_dense_reasons(inputs, dense) if dense else [])

    return reasons


PEERS = {
    peer.name: peer
    for peer in (
        Peer("sdpa", _needs(dense=1), _sdpa_of(None)),
        Peer("sdpa-packed", _single_query, _sdpa_packed),
        Peer("eager", _needs(dense=EAGER_TENSORS), _eager),
        Peer("flex", _flex_reasons, _flex, compiles=True),
        Peer("sdpa-efficient", _needs(cuda=True, dense=1), _sdpa_of("EFFICIENT_ATTENTION")),
        Peer("sdpa-cudnn", _needs(cuda=True, dense=1), _sdpa_of("CUDNN_ATTENTION")),
        Peer("flash-causal", _needs(cuda=True, square=True), _sdpa_causal("FLASH_ATTENTION"), causal_only=True),
        Peer("cudnn-causal", _needs(cuda=True, square=True), _sdpa_causal("CUDNN_ATTENTION"), causal_only=True),
        Peer("flash-attn", _needs(module="flash_attn", cuda=True, square=True), _flash_attn, causal_only=True),
        Peer("xformers", _needs(module="xformers", dense=1), _xformers),
    )
}
CPU_PEERS = ("sdpa", "eager", "flex")


@dataclass
class Prepared:
    """A peer ready to be timed, or why it is not."""

    name: str
    call: Callable[[], object] | None = None
    skipped: str | None = None
    compile_seconds: float | None = None
    causal_only: bool = False
    pairs: int | None = None  # visible ones of another problem: compared per pair


def prepare(name: str, inputs: Inputs, direction: str) -> Prepared:
    """The peer's forward (without autograd) or backward on these inputs; failures become reasons."""
    peer = PEERS[name]
    reasons = peer.reasons(inputs, direction)
    if reasons:
        return Prepared(name, skipped="; ".join(reasons))
    try:
        start = time.perf_counter()
        forward = peer.prepare(inputs)
        call = as_call(forward, inputs, direction)
        if peer.compiles:
            call()
        elapsed = time.perf_counter() - start
    except Exception as error:  # a peer's failure is a row of the table, whatever it is
        text = (str(error).splitlines() or [""])[0][:120]
        return Prepared(name, skipped=f"failed: {type(error).__name__}: {text}")
    return Prepared(name, call, None, elapsed if peer.compiles else None, peer.causal_only)


def as_call(forward: Callable[..., Tensor], inputs: Inputs, direction: str) -> Callable[[], object]:
    """``forward(q, k, v)`` as a call to time: without autograd, or the backward pass alone."""
    q, k, v = (t.detach() for t in (inputs.q, inputs.k, inputs.v))
    if direction == "forward":

        def run():
            with torch.no_grad():
                return forward(q, k, v)

        return run
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = forward(*leaves)
    grad = inputs.grad_out.to(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
