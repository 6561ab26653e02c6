"""Q-LLaMA: LLaMA with query tokens that attend to vision states."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_qllama import QLlamaConfig
from .modeling_qllama import (
    FixedLlamaRotaryEmbedding,
    LlamaAttention,
    LlamaCrossAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    _expand_mask,
    _make_causal_mask,
    apply_rotary_pos_emb,
    rotate_half,
)

AutoConfig.register("qllama", QLlamaConfig, exist_ok=True)
AutoModel.register(QLlamaConfig, LlamaModel, exist_ok=True)
AutoModelForCausalLM.register(QLlamaConfig, LlamaForCausalLM, exist_ok=True)

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
    "QLlamaConfig",
    "_expand_mask",
    "_make_causal_mask",
    "apply_rotary_pos_emb",
    "rotate_half",
]
