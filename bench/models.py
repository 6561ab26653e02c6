"""Whole models at a long prompt: ours against the same weights with eager and SDPA attention.

A few wide layers stand for the model: what a layer costs does not depend on how many there are. Weights are random;
before anything is timed the implementations must agree on the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from internvl_kernels import semantics
from internvl_kernels.models import hf_attention
from internvl_kernels.models.mpt import MPTConfig, MPTForCausalLM
from internvl_kernels.models.prefix_lm import convert_hf_causal_lm_to_prefix_lm
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    PretrainedConfig,
)

from . import baselines, gate
from .measure import Measurement

SEQLEN, WIDTH, HEADS, LAYERS, VOCABULARY, NEW_TOKENS = 2048, 1024, 8, 2, 1024, 32
MODES = ("prefill", "train", "decode")
TOLERANCE = {"float32": 2e-4, "bfloat16": 6e-2}  # of logits of order 1 after LAYERS layers

Implementations = dict[str, torch.nn.Module]  # "ours" first; the same weights in all


def _mpt(dtype: torch.dtype) -> Implementations:
    """MPT with ALiBi as a prefix LM: fused, and the original's eager arithmetic with its dense bias."""
    config = MPTConfig(
        d_model=WIDTH,
        n_heads=HEADS,
        n_layers=LAYERS,
        max_seq_len=SEQLEN + NEW_TOKENS,
        vocab_size=VOCABULARY,
        use_cache=True,
        attn_config={"alibi": True, "prefix_lm": True},
    )
    ours, eager = (MPTForCausalLM(config).to(dtype) for _ in range(2))
    eager.load_state_dict(ours.state_dict())
    eager.set_attn_impl("torch")
    return {"ours": ours, "eager": eager}


def _hf_mpt(dtype: torch.dtype) -> Implementations:
    """Causal MPT: ours against transformers' own MptForCausalLM (which has eager attention only)."""
    sizes = {"d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "vocab_size": VOCABULARY}
    ours = MPTForCausalLM(
        MPTConfig(
            **sizes, max_seq_len=SEQLEN + NEW_TOKENS, no_bias=True, use_cache=True, norm_type="layernorm",
            attn_config={"alibi": True},
        )
    )  # fmt: skip
    theirs = MptForCausalLM(MptConfig(**sizes, max_seq_len=SEQLEN + NEW_TOKENS))
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"MPT weights do not fit transformers' MPT: {missing} {unexpected}")
    return {"ours": ours.to(dtype), "hf": theirs.to(dtype)}


def _llama(dtype: torch.dtype) -> Implementations:
    """transformers' LLaMA, unmodified, with attn_implementation "internvl", "sdpa" and "eager"."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4,
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQLEN + NEW_TOKENS,
    )
    found, state = {}, None
    for name, implementation in (("ours", hf_attention.register()), ("sdpa", "sdpa"), ("eager", "eager")):
        own = copy.deepcopy(config)  # a model reads its implementation from its configuration, at every call
        own._attn_implementation = implementation
        model = LlamaForCausalLM(own).to(dtype)
        state = state or model.state_dict()
        model.load_state_dict(state)
        found[name] = model
    return found


def _prefix_lm(config: PretrainedConfig, *peers: str) -> Callable[[torch.dtype], Implementations]:
    """A causal LM of transformers as a prefix LM: converted, and with the ``peers`` attention on a dense mask."""

    def build(dtype: torch.dtype) -> Implementations:
        found, state = {}, None
        for name in ("ours", *peers):
            implementation = "eager" if name == "ours" else name.removesuffix("-causal")
            module = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation)
            state = state or module.state_dict()
            module.load_state_dict(state)
            found[name] = module.to(dtype)
        convert_hf_causal_lm_to_prefix_lm(found["ours"])
        return found

    return build


_SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
_GPT = {**_SIZES, "n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": SEQLEN, "resid_pdrop": 0.0}
_GPT |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0}
_WIDE = {**_SIZES, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
_WIDE["max_position_embeddings"] = SEQLEN
_NEO = {**_SIZES, "hidden_size": WIDTH, "num_heads": HEADS, "num_layers": LAYERS, "max_position_embeddings": SEQLEN}
_NEO["attention_types"] = [[["global"], LAYERS]]
_BLOOM = {**_SIZES, "hidden_size": WIDTH, "n_head": HEADS, "n_layer": LAYERS}
PREFIX_LMS = {
    "prefix-gpt2": _prefix_lm(GPT2Config(**_GPT), "sdpa", "eager"),
    "prefix-neox": _prefix_lm(GPTNeoXConfig(**_WIDE, intermediate_size=4 * WIDTH), "sdpa", "eager"),
    "prefix-opt": _prefix_lm(
        OPTConfig(**_WIDE, ffn_dim=4 * WIDTH, word_embed_proj_dim=WIDTH, dropout=0.0), "sdpa", "eager"
    ),
    "prefix-gptj": _prefix_lm(GPTJConfig(**_GPT, rotary_dim=64), "eager"),
    # Their own attention takes no dense prefix mask; the causal model costs the same and stands in for it.
    "prefix-gpt-neo": _prefix_lm(
        GPTNeoConfig(**_NEO, resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0), "eager-causal"
    ),
    "prefix-bloom": _prefix_lm(BloomConfig(**_BLOOM), "eager-causal"),
}

FAMILIES: dict[str, Callable[[torch.dtype], Implementations]] = {
    "mpt": _mpt,
    "hf-mpt": _hf_mpt,
    "llama": _llama,
    **PREFIX_LMS,
}


@dataclass(frozen=True)
class ModelCase:
    """A family of FAMILIES in one mode of MODES."""

    family: str
    mode: str
    dtype: str = "float32"
    seqlen: int = SEQLEN

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return f"model {self.family} S{self.seqlen}"

    def inputs(self) -> dict[str, torch.Tensor]:
        """Random tokens; for a prefix LM the first quarter is the prefix."""
        ids = torch.randint(0, VOCABULARY, (1, self.seqlen), generator=torch.Generator().manual_seed(0))
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.family == "mpt" and self.mode != "decode":  # generate treats the whole prompt as the prefix
            found["prefix_mask"] = (torch.arange(self.seqlen) < self.seqlen // 4)[None].to(ids)
        return found

    def inputs_of(self, module: torch.nn.Module, prefix: int | None = None) -> dict[str, torch.Tensor]:
        """The same for one implementation: a converted model takes key vectors, its peers a dense mask."""
        found = self.inputs()
        if self.family not in PREFIX_LMS:
            return found
        length = torch.tensor([self.seqlen // 4 if prefix is None else prefix], dtype=torch.int32)
        if getattr(module, "_prefix_lm_converted", False):
            return {**found, "bidirectional_mask": (torch.arange(self.seqlen)[None] < length[:, None]).long()}
        if self.family in ("prefix-gpt-neo", "prefix-bloom"):
            return found
        seen = semantics.visible_mask(1, self.seqlen, self.seqlen, prefix_len=length)
        found["attention_mask"] = torch.zeros(()).masked_fill(~seen[:, None], -torch.inf).to(module.dtype)
        if self.family == "prefix-opt":  # counts positions from a vector mask
            found["position_ids"] = torch.arange(self.seqlen)[None]
        return found


def _call(model: torch.nn.Module, case: ModelCase, prefix: int | None = None) -> Callable[[], object]:
    inputs = case.inputs_of(model, prefix)
    if case.mode == "train":
        model.train()

        def step():
            model.zero_grad(set_to_none=True)
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()

        return step
    model.eval()
    if case.mode == "decode":
        limits = {
            "max_new_tokens": NEW_TOKENS,
            "min_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "pad_token_id": 0,
            "use_cache": True,
        }
        return lambda: model.generate(**inputs, **limits)

    def prefill():
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits

    return prefill


def model(case: ModelCase, *, check: bool = True) -> Measurement:
    """Gates and prepares ``case``: logits of all implementations agree on a short prompt."""
    torch.manual_seed(0)
    implementations = FAMILIES[case.family](getattr(torch, case.dtype))
    if check:
        _agree(implementations, case)
    calls = {name: _call(module, case) for name, module in implementations.items()}
    ours = calls.pop("ours")
    facts = {"op": "model", "direction": case.mode, "backend": "cpu", "dtype": case.dtype, "shape": [1, case.seqlen]}
    peers = [baselines.Prepared(name, call) for name, call in calls.items()]
    return Measurement(case.name, ours, peers, ("", None), "cpu", facts)


def _agree(implementations: Implementations, case: ModelCase) -> None:
    short = ModelCase(case.family, "prefill", case.dtype, 160)
    causal_peers = any(name.endswith("-causal") for name in implementations)
    prefix = 0 if causal_peers else None
    logits = {name: _call(module, short, prefix)().float() for name, module in implementations.items()}
    for name, other in logits.items():
        try:
            torch.testing.assert_close(logits["ours"], other, atol=TOLERANCE[case.dtype], rtol=TOLERANCE[case.dtype])
        except AssertionError as error:
            raise gate.WrongResult(f"{case.name}: ours and {name} disagree: {error}") from error
