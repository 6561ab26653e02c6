"""Configuration of InternVL-14B."""

from __future__ import annotations

import copy

from transformers import PretrainedConfig

from ..qllama import QLlamaConfig
from .configuration_intern_vit import InternVisionConfig


class InternVLConfig(PretrainedConfig):
    """InternViT and Q-LLaMA, joined by query tokens.

    transformers has another model of this ``model_type``, so the Auto classes do not know this one: load it by
    ``InternVLModel.from_pretrained``.

    Args:
        vision_config, qllama_config: dicts or configurations; a dict is copied. Default: 6B and 8B sizes.
        num_query_token, cross_attention_frequency: also set on ``qllama_config``.
        clip_embed_dim, attn_pool_num_heads, label_smoothing: kept for configuration files.
        use_backbone_lora, use_qllama_lora: ranks of the LoRA adapters; 0 = none.
        force_image_size: image size that is fed; the position table is interpolated to it. None: vision_config's.
    Raises: ValueError (vision_hidden_size of the two halves differ; another model's configuration).
    """

    model_type = "internvl"
    is_composition = True
    sub_configs = {"vision_config": InternVisionConfig, "qllama_config": QLlamaConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: dict | InternVisionConfig | None = None,
        qllama_config: dict | QLlamaConfig | None = None,
        clip_embed_dim: int = 768,
        attn_pool_num_heads: int = 16,
        num_query_token: int = 96,
        label_smoothing: float = 0.0,
        cross_attention_frequency: int = 2,
        use_backbone_lora: int = 0,
        use_qllama_lora: int = 0,
        force_image_size: int | None = None,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        if qllama_config is None and kwargs.get("text_config") is not None:
            raise ValueError(
                "the configuration has a text_config and no qllama_config: it is transformers' InternVL, another model "
                "of the same model_type"
            )
        self.vision_config = _made(InternVisionConfig, vision_config)
        width = self.vision_config.hidden_size
        shared = {
            "num_query_token": num_query_token,
            "cross_attention_frequency": cross_attention_frequency,
            "vision_hidden_size": width,
        }
        if isinstance(qllama_config, QLlamaConfig):
            self.qllama_config = copy.deepcopy(qllama_config)
            found = self.qllama_config.vision_hidden_size
        else:
            found = (qllama_config or {}).get("vision_hidden_size", width)
            self.qllama_config = _made(QLlamaConfig, {**(qllama_config or {}), **shared})
        if found != width:
            raise ValueError(
                f"qllama_config.vision_hidden_size is {found}; vision_config.hidden_size is {width}, expected the same"
            )
        for name, value in shared.items():
            setattr(self.qllama_config, name, value)
        self.clip_embed_dim = clip_embed_dim
        self.attn_pool_num_heads = attn_pool_num_heads
        self.num_query_token = num_query_token
        self.label_smoothing = label_smoothing
        self.cross_attention_frequency = cross_attention_frequency
        self.use_backbone_lora = use_backbone_lora
        self.use_qllama_lora = use_qllama_lora
        self.force_image_size = force_image_size
        self.initializer_range = initializer_range
        self.hidden_size = self.qllama_config.hidden_size
        kwargs.pop("hidden_size", None)  # derived
        kwargs.setdefault("tie_word_embeddings", self.qllama_config.tie_word_embeddings)
        super().__init__(**kwargs)


def _made(kind, given):
    """A configuration of its own: neither a caller's dict nor a caller's object is shared or changed."""
    if isinstance(given, kind):
        return copy.deepcopy(given)
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"expected a dict or {kind.__name__}, found {type(given).__name__}")
    given = copy.deepcopy(given or {})
    given.pop("model_type", None)
    return kind(**given)
