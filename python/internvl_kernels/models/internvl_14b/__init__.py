"""InternVL-14B: InternViT, the query-token wrapper over Q-LLaMA, and its attention pooling block."""

from transformers import AutoConfig, AutoModel

from .configuration_intern_vit import InternVisionConfig
from .configuration_internvl import InternVLConfig
from .modeling_intern_vit import (
    InternAttention,
    InternMLP,
    InternRMSNorm,
    InternVisionEmbeddings,
    InternVisionEncoder,
    InternVisionEncoderLayer,
    InternVisionModel,
)
from .modeling_internvl import InternVLModel, InternVLPreTrainedModel
from .pooling import AttentionPoolingBlock, AttentiveBlock, CrossAttention

AutoConfig.register("intern_vit_6b", InternVisionConfig, exist_ok=True)
AutoModel.register(InternVisionConfig, InternVisionModel, exist_ok=True)

__all__ = [
    "AttentionPoolingBlock",
    "AttentiveBlock",
    "CrossAttention",
    "InternAttention",
    "InternMLP",
    "InternRMSNorm",
    "InternVLConfig",
    "InternVLModel",
    "InternVLPreTrainedModel",
    "InternVisionConfig",
    "InternVisionEmbeddings",
    "InternVisionEncoder",
    "InternVisionEncoderLayer",
    "InternVisionModel",
]
