"""The families whose attention is not on the interface of transformers: GPT-Neo, GPT-J, BLOOM; and OPT's positions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomForCausalLM, BloomModel, dropout_add
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoForCausalLM, GPTNeoSelfAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention, GPTJForCausalLM
from transformers.models.opt.modeling_opt import OPTForCausalLM

from ... import semantics
from ..hf_attention import internvl_attention
from ..hf_attention.carrier import is_carrier, without_prefix


class PrefixGPTNeoAttention(GPTNeoSelfAttention):
    """Unscaled scores; local layers keep their causal window and ignore the prefix."""

    def _attn(self, query, key, value, attention_mask=None, head_mask=None):
        if not is_carrier(attention_mask):
            given = () if head_mask is None else (head_mask,)
            return super()._attn(query, key, value, attention_mask, *given)
        window = None
        if self.config.attention_layers[self.layer_id] == "local":
            attention_mask, window = without_prefix(attention_mask), self.config.window_size
        dropout = self.attn_dropout.p if self.training else 0.0
        how = {"scaling": 1.0, "dropout": dropout, "sliding_window": window, "head_mask": head_mask}
        out, weights = internvl_attention(self, query, key, value, attention_mask, **how)
        return out.transpose(1, 2), weights


class PrefixGPTJAttention(GPTJAttention):
    def _attn(self, query, key, value, attention_mask=None, head_mask=None):
        if not is_carrier(attention_mask):
            given = () if head_mask is None else (head_mask,)
            return super()._attn(query, key, value, attention_mask, *given)
        dropout = self.attn_dropout.p if self.training else 0.0
        how = {"scaling": self.head_dim**-0.5, "dropout": dropout, "head_mask": head_mask}
        out, weights = internvl_attention(self, query, key, value, attention_mask, **how)
        return out.transpose(1, 2), weights


def bloom_alibi_slopes(n_heads: int, device=None) -> Tensor:
    """BLOOM's slopes, fp32 [H]: powers over the last power of two P <= H, then every other one over 2 P."""
    p = 2 ** math.floor(math.log2(n_heads))

    def powers(n: int, exponents: range) -> Tensor:
        base = torch.tensor(2 ** (-(2 ** -(math.log2(n) - 3))), dtype=torch.float32)
        return torch.pow(base, torch.tensor(list(exponents), dtype=torch.int32))

    rest = min(p, n_heads - p)
    return torch.cat([powers(p, range(1, p + 1)), powers(2 * p, range(1, 2 * rest, 2))]).to(device)


def bloom_alibi(n_heads: int, batch: int, seqlen_q: int, seqlen_k: int, dtype=torch.float32, device=None) -> Tensor:
    """BLOOM's bias with a prefix, dense: [B * H, Sq, Sk], -slope * |distance|. The kernels never form it."""
    p = semantics.positions(batch, seqlen_q, seqlen_k, None, device)
    return semantics.bias_matrix(bloom_alibi_slopes(n_heads, device), p, seqlen_k).flatten(0, 1).to(dtype)


class PrefixBloomModel(BloomModel):
    def build_alibi_tensor(self, attention_mask, num_heads, dtype):
        """With a carrier only the slopes: the kernels build the bias."""
        if is_carrier(attention_mask):
            return bloom_alibi_slopes(num_heads, attention_mask.device)
        return super().build_alibi_tensor(attention_mask, num_heads, dtype)


class PrefixBloomAttention(BloomAttention):
    def forward(self, hidden_states, residual, alibi, attention_mask, layer_past=None, **kwargs):
        if not is_carrier(attention_mask):
            return super().forward(hidden_states, residual, alibi, attention_mask, layer_past=layer_past, **kwargs)
        q, k, v = self._reshape(self.query_key_value(hidden_states))  # [B, H, S, D]
        if layer_past is not None:
            position = kwargs.get("cache_position")  # transformers 4
            given = () if position is None else ({"cache_position": position},)
            k, v = layer_past.update(k, v, self.layer_idx, *given)
        dropout = self.attention_dropout.p if self.training else 0.0
        how = {"scaling": self.inv_norm_factor, "dropout": dropout, "head_mask": kwargs.get("head_mask")}
        out, weights = internvl_attention(self, q, k, v, attention_mask, alibi_slopes=alibi, **how)
        out = self.dense(out.flatten(2))
        return dropout_add(out, residual, self.hidden_dropout, self.training), weights


@dataclass(frozen=True)
class Family:
    """What a causal-LM class needs beyond the attention interface.

    classes: modules that change their class. same_shape: without a cache the prefix mask must be as long as the input.
    positions_from_mask: position ids count real tokens, and are not given by default. takes_positions: whether the
    model has position ids at all.
    """

    classes: dict[type, type] = field(default_factory=dict)
    same_shape: bool = False
    positions_from_mask: bool = False
    takes_positions: bool = True


_FAMILIES = {
    GPTNeoForCausalLM: Family({GPTNeoSelfAttention: PrefixGPTNeoAttention}),
    GPTJForCausalLM: Family({GPTJAttention: PrefixGPTJAttention}),
    BloomForCausalLM: Family(
        {BloomModel: PrefixBloomModel, BloomAttention: PrefixBloomAttention}, same_shape=True, takes_positions=False
    ),
    OPTForCausalLM: Family(same_shape=True, positions_from_mask=True),
}


def family_of(model_class: type) -> Family:
    """The family of a causal-LM class or of the class it derives from; the plain one when it has no row."""
    return next((_FAMILIES[c] for c in model_class.__mro__ if c in _FAMILIES), Family())


PREFIX_CLASSES = {original: prefix for family in _FAMILIES.values() for original, prefix in family.classes.items()}
