"""The parts of one Q-LLaMA layer."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from ...functional import prefix_attention
from .cache import Slot, VisionSlot
from .configuration_qllama import QLlamaConfig
from .masks import SelfMask, dense_attention, full_mask
from .rotary import LlamaRotaryEmbedding, rotate


class LlamaRMSNorm(nn.Module):
    """``x * rsqrt(mean(x^2) + eps) * weight``, statistics in fp32.

    The normalised value is rounded to the weight's dtype only when that is fp16 or bf16; the result has the wider
    of its dtype and x's.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


class LlamaMLP(nn.Module):
    """``down_proj(act(gate_proj(x)) * up_proj(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaAttention(nn.Module):
    """Self-attention with rotary positions over the kernels; grouped key-value heads as configured."""

    def __init__(self, config: QLlamaConfig):
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bias = getattr(config, "attention_bias", False)
        width, kv_width = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(self.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(self.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(self.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, self.hidden_size, bias=bias)
        self.rotary_emb = LlamaRotaryEmbedding(self.head_dim, config.max_position_embeddings, config=config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | SelfMask | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Slot | tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ):
        """Args:
            hidden_states: [B, S, hidden_size].
            attention_mask: ``SelfMask`` (the kernels), additive [B, 1, S, T] (dense), None = all keys visible.
            position_ids: [1 or B, S]. Default: those after the cached tokens.
            past_key_value: ``Slot``, or (k, v) [B, Hkv, past, D], turned by their positions.
            position_embeddings: the rotary cos, sin [1 or B, S, D], when the caller made them for all layers.
        Returns: out [B, S, hidden_size]; weights [B, H, S, T] or None; the slot, a pair or None.
        Raises: ValueError (mask shape; weights of a ``SelfMask``); NotImplementedError (attention dropout in training).
        """
        self._check(attention_mask, output_attentions)
        q, k, v = (
            rearrange(project(hidden_states), "b s (h d) -> b s h d", d=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_embeddings is None:
            past = _past_length(past_key_value)
            total = past + q.shape[1]
            if position_ids is None:
                position_ids = torch.arange(past, total, device=q.device)[None]
            position_embeddings = self.rotary_emb.tables(position_ids, total, q.dtype)
        cos, sin = (t.to(q.device, q.dtype) for t in position_embeddings)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v, past_key_value = _append(past_key_value, k, v, use_cache)
        weights = None
        if isinstance(attention_mask, Tensor) or output_attentions:
            expected = (q.shape[0], 1, q.shape[1], k.shape[1])
            if attention_mask is not None and tuple(attention_mask.shape) != expected:
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}; expected [batch, 1, queries, keys] = "
                    f"{list(expected)}"
                )
            out, weights = dense_attention(q, k, v, attention_mask, output_attentions)
        else:
            mask = full_mask(q.shape[1], k.shape[1]) if attention_mask is None else attention_mask
            out = mask.attend(q, k, v)
        return self.o_proj(rearrange(out, "b s h d -> b s (h d)")), weights, past_key_value

    def _check(self, attention_mask, output_attentions: bool) -> None:
        if output_attentions and isinstance(attention_mask, SelfMask):
            raise ValueError("output_attentions needs attention_mask as a tensor: the kernels never form the weights")
        dropout = getattr(self.config, "attention_dropout", 0.0)
        if dropout and self.training:
            raise NotImplementedError(
                f"attention_dropout is {dropout} while training; the kernels have no dropout inside attention: set it "
                "to 0"
            )


class LlamaCrossAttention(nn.Module):
    """Query tokens attend to all vision states: no mask, no rotary positions, norms inside."""

    def __init__(self, config: QLlamaConfig):
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.vision_hidden_size = config.vision_hidden_size
        width, kv_width = self.num_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.norm1 = LlamaRMSNorm(self.hidden_size, eps=config.rms_norm_eps)
        self.norm2 = LlamaRMSNorm(self.vision_hidden_size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(self.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(self.vision_hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(self.vision_hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, self.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        vision_hidden_states: Tensor | None,
        repeat_time: int = 1,
        past_key_value: VisionSlot | tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
    ):
        """Args:
            hidden_states: [repeat_time * Bv, n, hidden_size], text-major: row r * Bv + b belongs to vision row b.
            vision_hidden_states: [Bv, Nv, vision_hidden_size]; unused when ``past_key_value`` holds some.
            repeat_time: texts per image; keys and values are not copied.
            past_key_value: projected vision states (k, v) [Bv, Hkv, Nv, D] of an earlier call, or the slot of a
                cache, which is filled when it is empty.
        Returns: out like hidden_states; weights [B, H, n, Nv] or None; (k, v) with ``use_cache``, else None.
        Raises: ValueError (batch sizes).
        """
        q = rearrange(self.q_proj(self.norm1(hidden_states)), "b s (h d) -> b s h d", d=self.head_dim)
        pair = past_key_value.pair() if isinstance(past_key_value, VisionSlot) else past_key_value
        if pair is None:
            vision = self.norm2(vision_hidden_states)
            pair = tuple(
                rearrange(project(vision), "b s (h d) -> b h s d", d=self.head_dim)
                for project in (self.k_proj, self.v_proj)
            )
            if isinstance(past_key_value, VisionSlot):
                past_key_value.keep(*pair)
        k, v = (t.transpose(1, 2) for t in pair)
        if q.shape[0] != repeat_time * k.shape[0]:
            raise ValueError(
                f"hidden_states has {q.shape[0]} samples and vision_hidden_states {k.shape[0]}; expected repeat_time * "
                f"{k.shape[0]} = {repeat_time * k.shape[0]}"
            )
        # the texts of one image are more queries of the same keys
        q = rearrange(q, "(r b) s h d -> b (r s) h d", r=repeat_time)
        if output_attentions:
            out, weights = dense_attention(q, k, v, None, True)
            weights = rearrange(weights, "b h (r s) t -> (r b) h s t", r=repeat_time)
        else:
            out, weights = prefix_attention(q, k, v, prefix_len=k.shape[1]), None
        out = rearrange(out, "b (r s) h d -> (r b) s (h d)", r=repeat_time)
        return self.o_proj(out), weights, pair if use_cache else None


class LlamaDecoderLayer(GradientCheckpointingLayer):
    """Self-attention, cross attention of the query rows (in some layers), MLP; each added to its input."""

    def __init__(self, config: QLlamaConfig, use_cross_attn: bool):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_query_token = config.num_query_token
        self.self_attn = LlamaAttention(config)
        self.cross_attn = LlamaCrossAttention(config) if use_cross_attn else None
        self.mlp = LlamaMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, getattr(config, "mlp_bias", False)
        )
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        vision_hidden_states: Tensor | None = None,
        attention_mask: Tensor | SelfMask | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Slot | tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        repeat_time: int = 1,
        query_rows: int | None = None,
        vision_key_value: VisionSlot | tuple[Tensor, Tensor] | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ):
        """Args:
            query_rows: the first so many rows are query tokens. Default: num_query_token, none when there are fewer.
            vision_key_value: the cross attention's ``past_key_value``.
            Others: as ``LlamaAttention`` and ``LlamaCrossAttention``.
        Returns: (hidden_states [, weights] [, slot]) as asked for.
        """
        attended, weights, past_key_value = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
        )
        hidden_states = hidden_states + attended
        if query_rows is None:
            query_rows = self.num_query_token if hidden_states.shape[1] >= self.num_query_token else 0
        kept = vision_key_value.pair() if isinstance(vision_key_value, VisionSlot) else vision_key_value
        has_vision = vision_hidden_states is not None or kept is not None
        if self.cross_attn is not None and has_vision and query_rows:
            queries, rest = hidden_states[:, :query_rows], hidden_states[:, query_rows:]
            attended, _, _ = self.cross_attn(queries, vision_hidden_states, repeat_time, vision_key_value)
            hidden_states = torch.cat([queries + attended, rest], 1)
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return (hidden_states, *([weights] if output_attentions else []), *([past_key_value] if use_cache else []))


def _past_length(past_key_value) -> int:
    if past_key_value is None:
        return 0
    return past_key_value.start if isinstance(past_key_value, Slot) else past_key_value[0].shape[2]


def _append(past_key_value, k: Tensor, v: Tensor, use_cache: bool):
    """k, v [B, T, Hkv, D] with the cache in front (views beyond the append), and the new cache slot."""
    if past_key_value is None and not use_cache:
        return k, v, None
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if isinstance(past_key_value, Slot):
        k, v = past_key_value.append(k, v)
        return k.transpose(1, 2), v.transpose(1, 2), past_key_value
    if past_key_value is not None:
        k, v = torch.cat([past_key_value[0], k], 2), torch.cat([past_key_value[1], v], 2)
    return k.transpose(1, 2), v.transpose(1, 2), (k, v) if use_cache else None
