"""Makes ``attn_implementation="internvl"`` known to transformers."""

from __future__ import annotations

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from .attention import internvl_attention
from .masks import internvl_mask

NAME = "internvl"  # transformers looks for flash, sdpa, flex, paged and slashes inside the name


def register() -> str:
    """Register the attention and the mask interface together; once or many times. Returns the name to pass.

    One without the other would lose padding silently: transformers then builds no mask at all.
    """
    AttentionInterface.register(NAME, internvl_attention)
    AttentionMaskInterface.register(NAME, internvl_mask)
    return NAME
