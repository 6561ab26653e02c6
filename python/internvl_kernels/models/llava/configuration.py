"""Configurations of the LLaVA classes: a language model's own, plus the fields that describe vision."""

from __future__ import annotations

from transformers import LlamaConfig

from ..mpt import MPTConfig

VISION_FIELDS = {
    "mm_vision_tower": None,
    "mm_vision_config": None,
    "mm_hidden_size": None,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "linear",
    "mm_tune_vision_tower": False,
    "use_mm_proj": True,
    "tune_mm_mlp_adapter": False,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_end_label_of_image": False,
    "mm_prefix": None,
}
PREFIXES = (None, "prompt", "images")


def _take_vision_fields(config, given: dict) -> None:
    """Move the vision fields out of ``given`` to attributes of ``config``. Raises: ValueError (mm_prefix)."""
    for name, default in VISION_FIELDS.items():
        setattr(config, name, given.pop(name, default))
    if config.mm_prefix not in PREFIXES:
        raise ValueError(f"mm_prefix is {config.mm_prefix!r}; allowed: {', '.join(map(repr, PREFIXES))}")


class LlavaConfig(LlamaConfig):
    """LlamaConfig plus the vision fields.

    Args:
        mm_vision_tower: folder or hub name of a vision checkpoint; its weights are read by ``load_model()``.
        mm_vision_config: configuration of the tower as dict: it is part of the model and of its checkpoints.
        mm_hidden_size: width of the tower. Default: taken from the tower.
        mm_vision_select_layer, mm_vision_select_feature, mm_tune_vision_tower: see ``VisionTower``.
        mm_projector_type: see ``build_vision_projector``.
        tune_mm_mlp_adapter, mm_use_im_start_end: both set: of the text only the tokens beside an image are trained.
        mm_use_im_patch_token, use_mm_proj: recorded by the setup helpers.
        mm_end_label_of_image: with the two flags above the token after an image takes the placeholder's label, as in
            the original. Default: it keeps its own.
        mm_prefix: which keys every token of the sequence may see: None, causal; 'prompt', all before the first
            label; 'images', the image tokens.
        kwargs: of LlamaConfig.
    Raises: ValueError (mm_prefix).
    """

    model_type = "llava_llama"

    def __init__(self, **kwargs):
        _take_vision_fields(self, kwargs)
        super().__init__(**kwargs)


class LlavaMptConfig(MPTConfig):
    """MPTConfig with the defaults of transformers' MPT (ALiBi, no biases) plus the vision fields of ``LlavaConfig``.

    ``mm_prefix`` and ``attn_config['prefix_lm']`` say the same; either may be given.
    Raises: ValueError (mm_prefix; the two contradict each other; no ALiBi); as MPTConfig.
    """

    model_type = "llava_mpt"

    def __init__(self, attn_config: dict | None = None, no_bias: bool = True, **kwargs):
        _take_vision_fields(self, kwargs)
        attn_config = {"alibi": True, **(attn_config or {})}
        prefix_lm = attn_config.setdefault("prefix_lm", self.mm_prefix is not None)
        if self.mm_prefix is None and prefix_lm:
            self.mm_prefix = "prompt"
        if self.mm_prefix is not None and not prefix_lm:
            raise ValueError(f"mm_prefix is {self.mm_prefix!r} and attn_config['prefix_lm'] is False; they disagree")
        if not attn_config["alibi"]:
            raise ValueError(
                "attn_config['alibi'] is False; image features carry no learned position, LLaVA needs ALiBi"
            )
        super().__init__(attn_config=attn_config, no_bias=no_bias, **kwargs)


class LlavaMptPrefixConfig(LlavaMptConfig):
    """LlavaMptConfig whose defaults are a prefix LM with biases and a cache."""

    model_type = "llava_mpt_prefix"

    def __init__(self, attn_config: dict | None = None, no_bias: bool = False, use_cache: bool = True, **kwargs):
        # 'triton' is the compiled CPU kernel on CPU tensors
        attn_config = {"prefix_lm": True, "attn_impl": "triton", **(attn_config or {})}
        super().__init__(attn_config=attn_config, no_bias=no_bias, use_cache=use_cache, **kwargs)
