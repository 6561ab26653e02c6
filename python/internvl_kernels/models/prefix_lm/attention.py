"""Attention of a converted model: a key carrier runs through the kernels, anything else through the model's own code.

The layers on the attention interface of transformers keep their class and get a view of their configuration that names
``NAME`` as attention implementation; the model itself keeps its own, so that its masks stay what they were.
"""

from __future__ import annotations

import inspect
import sys

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..hf_attention import internvl_attention
from ..hf_attention.carrier import is_carrier

NAME = "internvl_prefix_lm"


class LayerConfig:
    """A model's configuration as its attention layers see it: live, but for the attention implementation."""

    _attn_implementation = NAME

    def __init__(self, model_config):
        self.model_config = model_config

    def __getattr__(self, name: str):
        if name == "model_config" or name.startswith("__"):  # copying asks before there is anything to ask
            raise AttributeError(name)
        return getattr(self.model_config, name)


def prefix_lm_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
):
    """The function behind ``NAME``; as ``internvl_attention`` for carriers."""
    if is_carrier(attention_mask):
        return internvl_attention(module, query, key, value, attention_mask, **kwargs)
    implementation = module.config.model_config._attn_implementation
    if implementation != "eager":
        own = ALL_ATTENTION_FUNCTIONS[implementation]
    elif getattr(module, "reorder_and_upcast_attn", False):  # GPT-2 decides this by the name "eager"
        return module._upcast_and_reordered_attn(query, key, value, attention_mask)
    else:
        own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query, key, value, attention_mask, **kwargs)


def is_interface_layer(module: nn.Module) -> bool:
    """Whether a module looks its attention function up in the attention interface."""
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(forward, "__code__", is_interface_layer.__code__).co_names


AttentionInterface.register(NAME, prefix_lm_attention)
