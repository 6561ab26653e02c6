"""Rotary positions: tables made on the device of the call, from the frequencies of the configuration."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class LlamaRotaryEmbedding(nn.Module):
    """cos and sin of ``position * inv_freq``, both halves alike; nothing is stored, so no table can be too short.

    Args:
        dim: width of one head.
        max_position_embeddings: kept for the signature; positions have no limit.
        base: ``inv_freq = base ** (-2i / dim)``.
        device: kept for the signature; tables are made on the device of the input.
        config: a configuration whose rope scaling (linear, dynamic, yarn, llama3, longrope) is applied.
    """

    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 10000, device=None, *, config=None):
        super().__init__()
        self.dim = dim
        self.max_position_embeddings = max_position_embeddings
        self.rope_type, self.base, self.rope_config = "default", float(base), None
        if config is not None:
            settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
            self.rope_type = settings.get("rope_type", settings.get("type", "default"))
            self.base = float(settings.get("rope_theta") or getattr(config, "rope_theta", None) or base)
            self.rope_config = config
            if self.rope_type != "default" and self.rope_type not in ROPE_INIT_FUNCTIONS:
                allowed = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
                raise ValueError(f"rope_type is {self.rope_type!r}; allowed: {allowed}")

    def forward(self, x: Tensor, seq_len: int | None = None) -> tuple[Tensor, Tensor]:
        """cos, sin [1, 1, seq_len, dim] in x's dtype; seq_len defaults to that of x [B, H, S, dim]."""
        seq_len = x.shape[-2] if seq_len is None else seq_len
        cos, sin = self.tables(torch.arange(seq_len, device=x.device)[None], seq_len, x.dtype)
        return cos[:, None], sin[:, None]

    def tables(self, position_ids: Tensor, seqlen_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin [1 or B, S, dim] for position_ids [1 or B, S]; dynamic scalings go by the key length."""
        inv_freq, scale = self._frequencies(position_ids.device, seqlen_k)
        with torch.autocast(position_ids.device.type, enabled=False):
            angle = position_ids[..., None].float() * inv_freq  # [B, S, dim / 2]
            angle = torch.cat([angle, angle], -1)
            return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)

    def _frequencies(self, device: torch.device, seqlen_k: int) -> tuple[Tensor, float]:
        if self.rope_type != "default":
            inv_freq, scale = ROPE_INIT_FUNCTIONS[self.rope_type](self.rope_config, device, seq_len=seqlen_k)
            return inv_freq.to(device), scale
        exponent = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return 1.0 / self.base**exponent, 1.0

    def extra_repr(self) -> str:
        return f"dim={self.dim}, base={self.base:g}, rope_type={self.rope_type!r}"


FixedLlamaRotaryEmbedding = LlamaRotaryEmbedding


def rotate_half(x: Tensor) -> Tensor:
    """[a, b] -> [-b, a] over the halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, H, D] turned by cos, sin [1 or B, S, D]."""
    return x * cos.unsqueeze(-2) + rotate_half(x) * sin.unsqueeze(-2)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [B, H, S, D] turned by the rows ``position_ids`` [1 or B, S] of cos, sin [1, 1, T, D].

    Raises: ValueError (an id beyond the table, on tensors that the host can read).
    """
    rows = cos.shape[-2]
    if position_ids.device.type == "cpu" and not torch.compiler.is_compiling() and position_ids.numel():
        low, high = int(position_ids.min()), int(position_ids.max())
        if low < 0 or high >= rows:
            raise ValueError(f"position_ids holds {low} to {high}; the rotary table has the rows 0 to {rows - 1}")
    cos, sin = (t.reshape(rows, -1)[position_ids].unsqueeze(1) for t in (cos, sin))  # [B, 1, S, D]
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
