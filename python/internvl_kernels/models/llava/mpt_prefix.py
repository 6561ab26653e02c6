"""LLaVA over this package's MPT as a prefix language model: image and question see all of each other.

The image tokens and the prompt are the prefix (bidirectional), the answer is causal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ..mpt import MPTConfig, MPTForCausalLM, MPTModel
from .constants import IGNORE_INDEX
from .meta import LlavaMetaForCausalLM, LlavaMetaModel, cache_length


class LlavaMptPrefixConfig(MPTConfig):
    """MPTConfig plus the vision fields; ``attn_config`` defaults to prefix_lm, alibi and the compiled kernels.

    Args:
        mm_vision_tower: folder or hub name of a CLIP checkpoint; its weights are read by ``load_model()``.
        mm_vision_config: CLIPVisionConfig as dict: the tower is part of the model and of its checkpoints.
        mm_hidden_size: width of the tower. Default: taken from the tower.
        mm_vision_select_layer, mm_vision_select_feature, mm_tune_vision_tower: see ``CLIPVisionTower``.
        mm_projector_type: see ``build_vision_projector``.
        kwargs: of MPTConfig.
    """

    model_type = "llava_mpt_prefix"

    def __init__(
        self,
        mm_vision_tower: str | None = None,
        mm_vision_config: dict | None = None,
        mm_hidden_size: int | None = None,
        mm_vision_select_layer: int = -2,
        mm_vision_select_feature: str = "patch",
        mm_projector_type: str = "linear",
        mm_tune_vision_tower: bool = False,
        attn_config: dict | None = None,
        use_cache: bool = True,
        **kwargs,
    ):
        self.mm_vision_tower = mm_vision_tower
        self.mm_vision_config = mm_vision_config
        self.mm_hidden_size = mm_hidden_size
        self.mm_vision_select_layer = mm_vision_select_layer
        self.mm_vision_select_feature = mm_vision_select_feature
        self.mm_projector_type = mm_projector_type
        self.mm_tune_vision_tower = mm_tune_vision_tower
        # alibi, because embeddings without token ids carry no learned position; 'triton' is the compiled CPU kernel
        # on CPU tensors ('flash' is refused by MPT configurations, ``set_attn_impl`` switches to it)
        attn_config = {"prefix_lm": True, "alibi": True, "attn_impl": "triton", **(attn_config or {})}
        super().__init__(attn_config=attn_config, use_cache=use_cache, **kwargs)


class LlavaMptPrefixModel(LlavaMetaModel, MPTModel):
    """MPTModel with ``vision_tower`` and ``mm_projector``."""

    config_class = LlavaMptPrefixConfig


class LlavaMptPrefixForCausalLM(LlavaMetaForCausalLM, MPTForCausalLM):
    """MPT that reads images. With ``attn_config['prefix_lm']`` False the same model is causal throughout.

    Keys: ``transformer.*``, ``transformer.mm_projector.*``, ``transformer.vision_tower.vision_tower.*``.
    """

    config_class = LlavaMptPrefixConfig
    inner_model_class = LlavaMptPrefixModel
    accepts_inputs_embeds = True

    def get_model(self) -> LlavaMptPrefixModel:
        return self.transformer

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        **kwargs,
    ):
        """Logits over text and image positions, and the loss of the answer.

        Args:
            input_ids: [B, S] int64, IMAGE_TOKEN_INDEX marks each image.
            attention_mask: [B, S], 1 = real; padding on either side.
            prefix_mask: [B, S], 1 = visible to every query; an image takes its placeholder's value. Default: with
                labels, all real tokens before the first label; without, all real tokens.
            labels: [B, S] int64, IGNORE_INDEX on what is not answered.
            images: [n, C, H, W], [b, n, C, H, W] or a list; see ``image_slots``.
            kwargs: of MPTForCausalLM.
        Returns: as MPTForCausalLM, over the fused length L.
        Raises: ValueError (shapes, number of images).
        """
        one_step = past_key_values is not None and cache_length(past_key_values) > 0
        if images is not None and inputs_embeds is None and self.get_vision_tower() is not None and not one_step:
            # training MPT wants its padding on the right
            left_padded = attention_mask is not None and not bool((attention_mask[:, 0] != 0).all())
            pack = "right" if self.training and left_padded else None
            fused = self.fuse(input_ids, attention_mask, images, labels, pack)
            input_ids, inputs_embeds, attention_mask = None, fused.inputs_embeds, fused.real
            labels = None if labels is None else fused.plan.labels(labels)
            prefix_mask = None if prefix_mask is None else fused.plan.per_token(prefix_mask, 0)
        if not self.config.attn_config["prefix_lm"]:
            prefix_mask = None
        elif prefix_mask is None:
            prefix_mask = self._default_prefix(input_ids, inputs_embeds, attention_mask, labels, past_key_values)
        return super().forward(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            prefix_mask=prefix_mask,
            labels=labels,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _default_prefix(self, input_ids, inputs_embeds, attention_mask, labels, past_key_values) -> Tensor:
        """[B, T] bool: the prompt. On top of a cache nothing is: every earlier key is visible anyway."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        batch, seqlen = given.shape[:2]
        if past_key_values is not None and cache_length(past_key_values) > 0:
            total = cache_length(past_key_values) + seqlen
            return torch.zeros(batch, total, dtype=torch.bool, device=given.device)
        real = torch.ones(batch, seqlen, dtype=torch.bool, device=given.device)
        if attention_mask is not None:
            real = attention_mask != 0
        return real if labels is None else real & ((labels != IGNORE_INDEX).cumsum(1) == 0)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ):
        """``GenerationMixin.generate`` with images: greedy, beams or sampling, over a cache.

        The whole prompt is the prefix. Rows may hold different numbers of images and padding on either side.
        Args:
            inputs (or input_ids): [B, S] int64 with IMAGE_TOKEN_INDEX placeholders.
            images, attention_mask: as in ``forward``.
        Returns: as without images: sequences [B * num_return_sequences, S + new] that begin with the prompt.
        Raises: ValueError (shapes, number of images).
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if images is None or self.get_vision_tower() is None:
            return super().generate(inputs=input_ids, attention_mask=attention_mask, **kwargs)
        fused = self.fuse(input_ids, attention_mask, images, None, pack="left")
        out = super().generate(inputs_embeds=fused.inputs_embeds, attention_mask=fused.real.long(), **kwargs)
        new = out if isinstance(out, Tensor) else out.sequences
        prompt = input_ids.repeat_interleave(new.shape[0] // max(input_ids.shape[0], 1), dim=0)
        sequences = torch.cat([prompt, new], dim=1)
        if isinstance(out, Tensor):
            return sequences
        out.sequences = sequences
        return out

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; a tower that is not tuned comes back frozen (transformers makes new parameters)."""
        loaded = super().from_pretrained(*args, **kwargs)
        tower = (loaded[0] if isinstance(loaded, tuple) else loaded).get_vision_tower()
        if tower is not None:
            tower.requires_grad_(tower.trainable)
        return loaded

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; the tower's configuration goes along, so that loading needs no second checkpoint."""
        tower = self.get_vision_tower()
        if tower is not None and tower.is_loaded:
            self.config.mm_vision_config = tower.config.to_dict()
        return super().save_pretrained(*args, **kwargs)


AutoConfig.register(LlavaMptPrefixConfig.model_type, LlavaMptPrefixConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaMptPrefixConfig, LlavaMptPrefixForCausalLM, exist_ok=True)
