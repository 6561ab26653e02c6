"""Configuration of InternViT."""

from __future__ import annotations

from transformers import PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    """InternViT configuration; the defaults are those of InternViT-6B.

    Args:
        image_size, patch_size: the square grid of the position table; other sizes are interpolated.
        hidden_size, num_attention_heads, intermediate_size, num_hidden_layers: sizes.
        qkv_bias: a bias in the fused projection. qk_normalization: RMSNorm of q and k over the full width.
        use_flash_attn: kept for configuration files; the kernels serve every device.
        dropout: on the results of attention and MLP. drop_path_rate: stochastic depth of the last layer.
        initializer_factor: initial value of the layer scales.
    Raises: ValueError (hidden_size no multiple of the heads; dropout inside attention).
    """

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"

    def __init__(
        self,
        num_channels: int = 3,
        patch_size: int = 14,
        image_size: int = 224,
        qkv_bias: bool = False,
        hidden_size: int = 3200,
        num_attention_heads: int = 25,
        intermediate_size: int = 12800,
        qk_normalization: bool = True,
        num_hidden_layers: int = 48,
        use_flash_attn: bool = True,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 0.1,
        **kwargs,
    ):
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.image_size = image_size
        self.qkv_bias = qkv_bias
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.qk_normalization = qk_normalization
        self.num_hidden_layers = num_hidden_layers
        self.use_flash_attn = use_flash_attn
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.dropout = dropout
        self.drop_path_rate = drop_path_rate
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        super().__init__(**kwargs)
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size is {hidden_size}; it must be a multiple of num_attention_heads = {num_attention_heads}"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Of a vision model's file, or of a composite one: its ``vision_config`` is taken."""
        config_dict, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(config_dict.get("vision_config", config_dict), **kwargs)
