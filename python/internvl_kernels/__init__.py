"""Fused prefix-masked, ALiBi-biased attention and QK LayerNorm for PyTorch."""

__version__ = "0.1.0"

from . import registration  # noqa: F401  (registers torch.ops.internvl)
from .functional import clip_qk_layernorm, prefix_attention

__all__ = ["__version__", "clip_qk_layernorm", "prefix_attention"]
