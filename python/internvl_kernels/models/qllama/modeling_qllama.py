"""Q-LLaMA under the names of the original's module."""

from .causal_lm import LlamaForCausalLM
from .layers import LlamaAttention, LlamaCrossAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from .masks import _expand_mask, _make_causal_mask
from .model import LlamaModel, LlamaPreTrainedModel
from .rotary import FixedLlamaRotaryEmbedding, LlamaRotaryEmbedding, apply_rotary_pos_emb, rotate_half

__all__ = [
    "FixedLlamaRotaryEmbedding",
    "LlamaAttention",
    "LlamaCrossAttention",
    "LlamaDecoderLayer",
    "LlamaForCausalLM",
    "LlamaMLP",
    "LlamaModel",
    "LlamaPreTrainedModel",
    "LlamaRMSNorm",
    "LlamaRotaryEmbedding",
    "_expand_mask",
    "_make_causal_mask",
    "apply_rotary_pos_emb",
    "rotate_half",
]
