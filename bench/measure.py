"""One measurement: gate, then interleaved rounds of ours, the peers and the ceiling; a row of plain JSON values."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator

import torch
from internvl_kernels import clip_qk_layernorm
from internvl_kernels.testing import device_of

from . import baselines, gate, results, roofline
from .cases import BenchCase, NormCase
from .timing import Rounds, Timer, peak_mib

ROUNDS = 7
LEAST_SHARE = 0.05  # of a step: a smaller part of it cannot be told from the noise of the difference of two steps
PRUNE_VARIABLE = "INTERNVL_ALIBI_PRUNE"
MOST_ANCHORS = 8


class Measurement:
    """Gated and prepared calls of one case, ready for ``rounds()``; ``row()`` is what was found.

    ``ours`` and the ceiling are calls like the peers; who times them is up to the caller (pytest-benchmark times ours
    itself). ``parts``: of a step with attention in it, the calls "without attention" and "attention alone".
    """

    def __init__(
        self,
        group: str,
        ours: Callable[[], object],
        peers: list[baselines.Prepared],
        ceiling,
        device: str,
        facts: dict,
        parts: dict[str, Callable[[], object]] | None = None,
    ) -> None:
        self.ours, self.peers, self.device, self.facts = ours, peers, device, {"case": group, **facts}
        self.ceiling_name, ceiling_call = ceiling
        calls = {peer.name: peer.call for peer in peers if peer.call} | (parts or {})
        if ceiling_call:
            calls[self.ceiling_name] = ceiling_call
        self.timer = Timer(device)
        self.others = Rounds(calls, self.timer)
        self.own = Rounds({"ours": ours}, self.timer)

    def rounds(self, count: int = ROUNDS) -> None:
        """``count`` timed rounds after a warm-up round."""
        for _ in range(count + 1):
            self.others.round()
            self.own.round()

    def row(self, own: dict[str, float] | None = None, *, memory: bool = False) -> dict:
        """The result; ``own`` replaces our times when somebody else measured them."""
        own = own or self.own.summary()["ours"]
        others = self.others.summary()
        row = {**self.facts, "ours": dict(own), "peers": {}}
        ms = own["median_ms"]
        if self.facts.get("flops"):
            row["ours"]["gflops"] = self.facts["flops"] / ms / 1e6
        if self.facts.get("bytes"):
            row["ours"]["gbytes"] = self.facts["bytes"] / ms / 1e6
        if self.ceiling_name in others:
            row["ceiling"] = {"name": self.ceiling_name, **others[self.ceiling_name]}
            row["ours"]["share_of_ceiling"] = others[self.ceiling_name]["median_ms"] / ms
        without = others.get("without attention", {}).get("median_ms")
        if without is not None:
            row["ours"]["attention"] = _attention_part(ms, without, others["attention alone"]["median_ms"])
        if memory:
            row["ours"]["peak_mib"] = peak_mib(self.ours, self.device)
        for peer in self.peers:
            if peer.skipped:
                row["peers"][peer.name] = {"skipped": peer.skipped}
                continue
            found = dict(others[peer.name])
            found["ratio"] = found["median_ms"] / ms
            pairs = self.facts["causal_pairs"] if peer.causal_only else peer.pairs
            if pairs:  # not those that we see: compared per visible pair
                found["ratio"] *= self.facts["pairs"] / pairs
                found["per_pair"] = True
            if without is not None and ms - without > LEAST_SHARE * ms:
                found["attention_ratio"] = (found["median_ms"] - without) / (ms - without)
            if peer.compile_seconds is not None:
                found["compile_s"] = peer.compile_seconds
            if memory:
                found["peak_mib"] = peak_mib(peer.call, self.device)
            row["peers"][peer.name] = found
        return row


def _attention_part(step_ms: float, without_ms: float, alone_ms: float) -> dict[str, float]:
    """What attention adds to a step, and what the operator needs for the same calls with nothing around them."""
    return {
        "added_ms": step_ms - without_ms,
        "alone_ms": alone_ms,
        "share": 1 - without_ms / step_ms,
        "share_predicted": alone_ms / (without_ms + alone_ms),
    }


def attention(
    case: BenchCase,
    *,
    direction: str = "forward",
    backend: str = "cpu",
    peers: Iterable[str] = baselines.CPU_PEERS,
    check: bool = True,
) -> Measurement:
    """``prefix_attn`` of ``backend`` on ``case``. Raises gate.WrongResult before anything is timed.

    ALiBi distance pruning is off, so that the rate counts work that was done; ``pruning`` measures what it adds.
    """
    device = device_of(backend)
    own, clean = gate.inputs_for(case, device)
    forward = gate.operator(backend, own)
    if check:
        with torch.no_grad():
            out = forward(own.q, own.k, own.v)
        gate.check(case, backend, own, out, gradients=direction == "backward")
    c, flops = case.case, case.flops(direction)
    decode = c.seqlen_q * (c.heads_q // c.heads_kv) < 16 and c.seqlen_q < c.seqlen_k
    if decode and device == "cuda":
        ceiling = ("copy", roofline.copy_of(case.kv_bytes, device))  # a GPU's dot product reads slower than it copies
    elif decode:
        ceiling = ("read", roofline.read_of(case.kv_bytes, device))
    else:
        dtype = roofline.matmul_dtype(c.dtype, device)
        ceiling = (f"matmul {dtype}", roofline.matmul_of(flops, getattr(torch, dtype), device))
    facts = {
        "op": "prefix_attn",
        "direction": direction,
        "backend": backend,
        "dtype": c.dtype,
        "shape": [c.batch, c.seqlen_q, c.seqlen_k, c.heads_q, c.heads_kv, c.head_dim],
        "pairs": case.visible_pairs,
        "causal_pairs": c.batch * c.heads_q * c.seqlen_q * (c.seqlen_q + 1) // 2,
        "flops": flops,
        "bytes": case.kv_bytes if decode else case.min_bytes(direction),
    }
    prepared = [baselines.prepare(name, clean, direction) for name in peers]
    ours = _with_prune(False, baselines.as_call(forward, own, direction))
    return Measurement(case.name, ours, prepared, ceiling, device, facts)


@contextlib.contextmanager
def alibi_prune(on: bool) -> Iterator[None]:
    """Distance pruning on or off for the calls inside."""
    before = os.environ.get(PRUNE_VARIABLE)
    os.environ[PRUNE_VARIABLE] = str(int(on))
    try:
        yield
    finally:
        if before is None:
            del os.environ[PRUNE_VARIABLE]
        else:
            os.environ[PRUNE_VARIABLE] = before


def _with_prune(on: bool, call: Callable[[], object]) -> Callable[[], object]:
    def run():
        with alibi_prune(on):
            return call()

    return run


def _forward(case: BenchCase, backend: str, pruned: bool) -> tuple[Callable[[], object], str, dict]:
    """A gated forward with pruning on or off, its device and its facts."""
    with alibi_prune(pruned):
        found = attention(case, backend=backend, peers=())
    own, _ = gate.inputs_for(case, found.device)
    call = baselines.as_call(gate.operator(backend, own), own, "forward")
    facts = {name: value for name, value in found.facts.items() if name != "case"}
    return _with_prune(pruned, call), found.device, facts


def pruning(case: BenchCase, *, backend: str = "cpu") -> Measurement:
    """``prefix_attn`` with ALiBi distance pruning; the peer is ourselves without it."""
    pruned, device, facts = _forward(case, backend, True)
    unpruned, _, _ = _forward(case, backend, False)
    return Measurement(case.name, pruned, [baselines.Prepared("unpruned", unpruned)], ("", None), device, facts)


def growth(case: BenchCase, anchor: BenchCase, *, pruned: bool, backend: str = "cpu") -> Measurement:
    """``prefix_attn`` with pruning on or off: how time and memory grow with the length.

    The peer is ourselves without pruning on ``anchor``, the same for all lengths: times of rows that were measured
    minutes apart can then be compared, whatever else the machine had to do. Repeated, up to about as long.
    """
    call, device, facts = _forward(case, backend, pruned)
    once, _, _ = _forward(anchor, backend, False)
    repeats = max(1, min(MOST_ANCHORS, case.visible_pairs // anchor.visible_pairs))

    def anchors():
        for _ in range(repeats):
            once()

    peer = baselines.Prepared(results.ANCHOR, anchors, pairs=repeats * anchor.visible_pairs)
    return Measurement(case.name, call, [peer], ("", None), device, facts)


def _unfused_norm(case: NormCase, clip: float):
    width = case.q_width

    def forward(qkv, q_weight, q_bias, k_weight, k_bias):
        q, k, v = qkv.clamp(-clip, clip).split([width, case.k_width, case.k_width], dim=-1)
        q = torch.nn.functional.layer_norm(q, q.shape[-1:], q_weight, q_bias)
        return q, torch.nn.functional.layer_norm(k, k.shape[-1:], k_weight, k_bias), v.contiguous()

    return forward


def norm(case: NormCase, *, direction: str = "forward", backend: str = "cpu", check: bool = True) -> Measurement:
    """``clip_qk_layernorm`` of ``backend`` against clamp, split and two layer norms, under the ceiling of a copy."""
    device, dtype, clip = device_of(backend), getattr(torch, case.dtype), 6.0
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    qkv = random(case.rows, case.q_width + 2 * case.k_width)
    parameters = [random(n) for n in (case.q_width, case.q_width, case.k_width, case.k_width)]
    leaves = [qkv, *parameters]

    def ours(x, *weights):
        return clip_qk_layernorm(x, case.q_width, case.k_width, clip, *weights, backend=backend)

    unfused = _unfused_norm(case, clip)
    if check:
        gate.check_norm(case, backend, leaves, clip, gradients=direction == "backward")
    runs = {}
    for name, forward in {"ours": ours, "unfused": unfused}.items():
        if direction == "forward":
            runs[name] = _without_grad(forward, leaves)
            continue
        tracked = [t.clone().requires_grad_() for t in leaves]
        out = forward(*tracked)
        grads = [torch.randn_like(t) for t in out]
        runs[name] = lambda out=out, tracked=tracked, grads=grads: torch.autograd.grad(
            out, tracked, grads, retain_graph=True
        )
    nbytes = case.min_bytes(direction)
    facts = {
        "op": "clip_qk_layernorm",
        "direction": direction,
        "backend": backend,
        "dtype": case.dtype,
        "shape": [case.rows, case.q_width, case.k_width],
        "bytes": nbytes,
    }
    if direction == "forward":
        ceiling = ("copy to new memory", roofline.stream_of(1, list(ours(*leaves))))
    else:
        ceiling = ("add to new memory", roofline.stream_of(2, [qkv]))
    return Measurement(
        case.name, runs["ours"], [baselines.Prepared("unfused", runs["unfused"])], ceiling, device, facts
    )


def _without_grad(forward, leaves):
    def run():
        with torch.no_grad():
            return forward(*leaves)

    return run
