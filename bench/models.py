"""Whole models at a long prompt: ours against the same weights with eager and SDPA attention.

One wide layer stands for the model: what a layer costs does not depend on how many there are. Weights are random;
before anything is timed the implementations must agree on the logits. What attention adds to a step is measured too:
the step, the step without attention, and the attention calls of the step alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import baselines, families, gate, multimodal
from .exchange import Exchanged, alone, nothing
from .families import NEW_TOKENS, Family, Implementations, Sizes
from .measure import Measurement

MODES = ("prefill", "train", "decode")
TOLERANCE = {"float32": 2e-4, "bfloat16": 6e-2}  # of logits of order 1
AGREE_TOKENS = 160

FAMILIES: dict[str, Family] = {**families.FAMILIES, **multimodal.FAMILIES}

# Without bf16 instructions torch multiplies bf16 matrices at 1 GFLOP/s (GPT-2, every backward pass) to 17, against 127
# in fp32: a training step of the usual sizes takes minutes, nearly all of them outside of attention.
NARROW = Sizes(heads=2, mlp_ratio=1, vocabulary=256)


@functools.cache
def bf16_instructions() -> bool:
    """Whether torch's bf16 matrix products run on instructions made for them."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def sizes_of(dtype: str) -> Sizes:
    """What is measured on this machine."""
    return NARROW if dtype == "bfloat16" and not bf16_instructions() else Sizes()


@dataclass(frozen=True)
class ModelCase:
    """A family of FAMILIES in one mode of MODES. sizes: what ``sizes_of`` says."""

    family: str
    mode: str
    dtype: str = "float32"
    sizes: Sizes | None = None

    @property
    def chosen(self) -> Sizes:
        """The sizes."""
        return self.sizes or sizes_of(self.dtype)

    @property
    def name(self) -> str:
        """As it stands in tables."""
        sizes = self.chosen
        small = "" if sizes == Sizes() else f" width {sizes.width}"
        return f"model {self.family} S{sizes.seqlen}{small}"


def _call(module: torch.nn.Module, case: ModelCase) -> Callable[[], object]:
    sizes, inner = case.chosen, module.module if isinstance(module, Exchanged) else module
    inputs = FAMILIES[case.family].inputs(inner, sizes, sizes.seqlen, case.mode)
    if case.mode == "train":
        module.train()

        def step():
            module.zero_grad(set_to_none=True)
            module(**inputs, use_cache=False).loss.backward()

        return step
    module.eval()
    if case.mode == "decode":
        limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        return lambda: module.generate(**inputs, **limits, use_cache=True)
    return lambda: _logits(module, inputs)


@torch.no_grad()
def _logits(module: torch.nn.Module, inputs: dict) -> torch.Tensor:
    return module(**inputs, use_cache=False).logits


def model(case: ModelCase, *, check: bool = True) -> Measurement:
    """Gates and prepares ``case``: logits of all implementations agree on a short prompt."""
    torch.manual_seed(0)
    implementations = FAMILIES[case.family].build(case.chosen, getattr(torch, case.dtype))
    if check:
        _agree(implementations, case)
    calls = {name: _call(module, case) for name, module in implementations.items()}
    ours = calls.pop("ours")
    parts = {}
    if case.mode != "decode":  # there the step is the cache: see the operator's own decode rows
        parts["without attention"] = _call(Exchanged(implementations["ours"], lambda: nothing), case)
        parts["attention alone"] = alone(ours, backward=case.mode == "train")
    sizes = case.chosen
    facts = {"op": "model", "direction": case.mode, "backend": "cpu", "dtype": case.dtype}
    facts |= {"shape": [1, sizes.seqlen, sizes.heads, families.HEAD_DIM, sizes.layers]}
    peers = [baselines.Prepared(name, call) for name, call in calls.items()]
    return Measurement(case.name, ours, peers, ("", None), "cpu", facts, parts)


def _agree(implementations: Implementations, case: ModelCase) -> None:
    family, sizes = FAMILIES[case.family], case.chosen
    seqlen = min(max(AGREE_TOKENS, family.shortest(sizes)), sizes.seqlen)
    logits = {}
    for name, module in implementations.items():
        inner = module.module if isinstance(module, Exchanged) else module
        logits[name] = _logits(module.eval(), family.inputs(inner, sizes, seqlen, "agree")).float()
    for name, other in logits.items():
        try:
            torch.testing.assert_close(logits["ours"], other, atol=TOLERANCE[case.dtype], rtol=TOLERANCE[case.dtype])
        except AssertionError as error:
            raise gate.WrongResult(f"{case.name}: ours and {name} disagree: {error}") from error
