"""Language models to be measured: ours, and the same weights with the attention a user would have instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from internvl_kernels import semantics
from internvl_kernels.models import hf_attention
from internvl_kernels.models.mpt import MPTConfig, MPTForCausalLM
from internvl_kernels.models.prefix_lm import convert_hf_causal_lm_to_prefix_lm
from torch import Tensor, nn
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

HEAD_DIM, NEW_TOKENS = 128, 32
Implementations = dict[str, nn.Module]  # "ours" first; the same weights in all


@dataclass(frozen=True)
class Sizes:
    """A model in small: what a layer costs does not depend on how many there are.

    mlp_ratio: width of the MLPs over that of the model, where transformers does not fix it (MPT and BLOOM: 4).
    image_side: patches on a side of the picture, for the models that read one.
    """

    heads: int = 8
    layers: int = 1
    mlp_ratio: int = 4
    vocabulary: int = 1024
    image_side: int = 24
    seqlen: int = 2048

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.heads * HEAD_DIM

    @property
    def kv_heads(self) -> int:
        """Key heads of grouped-query models."""
        return max(1, self.heads // 4)

    @property
    def positions(self) -> int:
        """What a configuration allows for."""
        return self.seqlen + NEW_TOKENS


@dataclass(frozen=True)
class Family:
    """``build(sizes, dtype)`` -> implementations; ``inputs(module, sizes, seqlen, mode)`` -> arguments of one of them.

    modes: of "prefill", "train" and "decode", those that are measured. shortest: the shortest sequence it takes.
    """

    build: Callable[[Sizes, torch.dtype], Implementations]
    inputs: Callable[[nn.Module, Sizes, int, str], dict[str, Tensor]]
    modes: tuple[str, ...] = ("prefill", "train", "decode")
    shortest: Callable[[Sizes], int] = lambda _sizes: 1


def token_ids(sizes: Sizes, seqlen: int) -> Tensor:
    """[1, seqlen] random tokens, always the same."""
    return torch.randint(0, sizes.vocabulary, (1, seqlen), generator=torch.Generator().manual_seed(0))


def text_inputs(_module: nn.Module, sizes: Sizes, seqlen: int, mode: str) -> dict[str, Tensor]:
    """Tokens, and as labels the same."""
    ids = token_ids(sizes, seqlen)
    labels = {"labels": ids} if mode == "train" else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **labels}


def _mpt(sizes: Sizes, dtype: torch.dtype) -> Implementations:
    """MPT with ALiBi as a prefix LM: fused, and the original's eager arithmetic with its dense bias."""
    config = MPTConfig(
        d_model=sizes.width,
        n_heads=sizes.heads,
        n_layers=sizes.layers,
        expansion_ratio=sizes.mlp_ratio,
        max_seq_len=sizes.positions,
        vocab_size=sizes.vocabulary,
        use_cache=True,
        attn_config={"alibi": True, "prefix_lm": True},
    )
    ours, eager = (MPTForCausalLM(config).to(dtype) for _ in range(2))
    eager.load_state_dict(ours.state_dict())
    eager.set_attn_impl("torch")
    return {"ours": ours, "eager": eager}


def _mpt_inputs(module: nn.Module, sizes: Sizes, seqlen: int, mode: str) -> dict[str, Tensor]:
    """The first quarter is the prefix; ``generate`` takes the whole prompt."""
    found = text_inputs(module, sizes, seqlen, mode)
    if mode != "decode":
        found["prefix_mask"] = (torch.arange(seqlen) < seqlen // 4)[None].long()
    return found


def hf_mpt(sizes: Sizes, state: dict[str, Tensor]) -> MptForCausalLM:
    """transformers' own MPT, which has eager attention only, with the weights of ours."""
    config = MptConfig(
        d_model=sizes.width,
        n_heads=sizes.heads,
        n_layers=sizes.layers,
        max_seq_len=sizes.positions,
        vocab_size=sizes.vocabulary,
    )
    theirs = MptForCausalLM(config)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"MPT weights do not fit transformers' MPT: {missing} {unexpected}")
    return theirs


def _hf_mpt(sizes: Sizes, dtype: torch.dtype) -> Implementations:
    """Causal MPT: ours against transformers' own."""
    config = MPTConfig(
        d_model=sizes.width,
        n_heads=sizes.heads,
        n_layers=sizes.layers,
        vocab_size=sizes.vocabulary,
        max_seq_len=sizes.positions,
        no_bias=True,
        use_cache=True,
        norm_type="layernorm",
        attn_config={"alibi": True},
    )
    ours = MPTForCausalLM(config)
    return {"ours": ours.to(dtype), "hf": hf_mpt(sizes, ours.state_dict()).to(dtype)}


def llama_config(sizes: Sizes, **more) -> dict:
    """The fields of a grouped-query LLaMA."""
    return {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp_ratio * sizes.width,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "num_hidden_layers": sizes.layers,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": sizes.positions,
        **more,
    }


def _llama(sizes: Sizes, dtype: torch.dtype) -> Implementations:
    """transformers' LLaMA, unmodified, with attn_implementation "internvl", "sdpa" and "eager"."""
    found, state = {}, None
    for name, implementation in (("ours", hf_attention.register()), ("sdpa", "sdpa"), ("eager", "eager")):
        own = LlamaConfig(**llama_config(sizes))  # a model reads its implementation from it at every call
        own._attn_implementation = implementation
        model = LlamaForCausalLM(own).to(dtype)
        state = state or model.state_dict()
        model.load_state_dict(state)
        found[name] = model
    return found


def _prefix_lm(config_of: Callable[[Sizes], PretrainedConfig], *peers: str) -> Family:
    """A causal LM of transformers as a prefix LM: converted, and with the ``peers`` attention on a dense mask."""

    def build(sizes: Sizes, dtype: torch.dtype) -> Implementations:
        found, state, config = {}, None, config_of(sizes)
        for name in ("ours", *peers):
            implementation = "eager" if name == "ours" else name.removesuffix("-causal")
            module = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation)
            state = state or module.state_dict()
            module.load_state_dict(state)
            found[name] = module.to(dtype)
        convert_hf_causal_lm_to_prefix_lm(found["ours"])
        return found

    def inputs(module: nn.Module, sizes: Sizes, seqlen: int, mode: str) -> dict[str, Tensor]:
        """The first quarter is the prefix. A converted model takes key vectors, its peers a dense mask."""
        found = text_inputs(module, sizes, seqlen, mode)
        causal = any(name.endswith("-causal") for name in peers)
        length = torch.tensor([0 if causal and mode == "agree" else seqlen // 4], dtype=torch.int32)
        if getattr(module, "_prefix_lm_converted", False):
            return {**found, "bidirectional_mask": (torch.arange(seqlen)[None] < length[:, None]).long()}
        if causal:
            return found
        seen = semantics.visible_mask(1, seqlen, seqlen, prefix_len=length)
        found["attention_mask"] = torch.zeros(()).masked_fill(~seen[:, None], -torch.inf).to(module.dtype)
        if module.config.model_type == "opt":  # counts positions from a vector mask
            found["position_ids"] = torch.arange(seqlen)[None]
        return found

    return Family(build, inputs, ("prefill", "train"))  # nobody else decodes prefix LMs


def _gpt(sizes: Sizes) -> dict:
    found = {"vocab_size": sizes.vocabulary, "bos_token_id": 0, "eos_token_id": 0, "n_embd": sizes.width}
    found |= {"n_head": sizes.heads, "n_layer": sizes.layers, "n_positions": sizes.positions}
    found |= {"n_inner": sizes.mlp_ratio * sizes.width}
    return found | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _wide(sizes: Sizes) -> dict:
    found = {"vocab_size": sizes.vocabulary, "bos_token_id": 0, "eos_token_id": 0, "hidden_size": sizes.width}
    found |= {"num_attention_heads": sizes.heads, "num_hidden_layers": sizes.layers}
    return found | {"max_position_embeddings": sizes.positions}


def _opt(sizes: Sizes) -> OPTConfig:
    mlp = {"ffn_dim": sizes.mlp_ratio * sizes.width, "word_embed_proj_dim": sizes.width}
    return OPTConfig(**_wide(sizes), **mlp, dropout=0.0)


def _gpt_neo(sizes: Sizes) -> GPTNeoConfig:
    found = _wide(sizes)
    found |= {"num_heads": found.pop("num_attention_heads"), "num_layers": found.pop("num_hidden_layers")}
    found |= {"attention_types": [[["global"], sizes.layers]], "intermediate_size": sizes.mlp_ratio * sizes.width}
    return GPTNeoConfig(**found, resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0)


def _bloom(sizes: Sizes) -> BloomConfig:
    found = _wide(sizes)
    found |= {"n_head": found.pop("num_attention_heads"), "n_layer": found.pop("num_hidden_layers")}
    return BloomConfig(**found)


FAMILIES = {
    "mpt": Family(_mpt, _mpt_inputs),
    "hf-mpt": Family(_hf_mpt, text_inputs),
    "llama": Family(_llama, text_inputs),
    "prefix-gpt2": _prefix_lm(lambda sizes: GPT2Config(**_gpt(sizes)), "sdpa", "eager"),
    "prefix-neox": _prefix_lm(
        lambda sizes: GPTNeoXConfig(**_wide(sizes), intermediate_size=sizes.mlp_ratio * sizes.width), "sdpa", "eager"
    ),
    "prefix-opt": _prefix_lm(_opt, "sdpa", "eager"),
    "prefix-gptj": _prefix_lm(lambda sizes: GPTJConfig(**_gpt(sizes), rotary_dim=64), "eager"),
    # Their own attention takes no dense prefix mask; the causal model costs the same and stands in for it.
    "prefix-gpt-neo": _prefix_lm(_gpt_neo, "eager-causal"),
    "prefix-bloom": _prefix_lm(_bloom, "eager-causal"),
}
