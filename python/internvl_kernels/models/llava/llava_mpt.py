"""LLaVA over this package's MPT, which is transformers' MPT when it has no biases and no QK LayerNorm.

``LlavaMptForCausalLM`` reads and writes the checkpoints of LLaVA's MPT back end. ``LlavaMptPrefixForCausalLM`` is the
same model with the defaults of a prefix LM: image tokens and prompt see all of each other, the answer is causal.
"""

from __future__ import annotations

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from ..mpt import MPTForCausalLM, MPTModel
from .cache import as_cache
from .configuration import LlavaMptConfig, LlavaMptPrefixConfig
from .meta import LlavaMetaModel
from .multimodal import LlavaMultimodal


class LlavaMptModel(LlavaMetaModel, MPTModel):
    """MPTModel with ``vision_tower`` and ``mm_projector``."""

    config_class = LlavaMptConfig


class LlavaMptForCausalLM(LlavaMultimodal, MPTForCausalLM):
    """MPT that reads images.

    Keys: ``transformer.*``, ``transformer.mm_projector.*``, ``transformer.vision_tower.vision_tower.*``; the output
    head is the embedding table (``lm_head.weight`` in a checkpoint must equal it).
    """

    config_class = LlavaMptConfig
    inner_model_class = LlavaMptModel
    accepts_inputs_embeds = True
    pad_side_in_training = "right"

    def get_model(self) -> LlavaMptModel:
        return self.transformer

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        images: Tensor | list[Tensor] | None = None,
        prefix_mask: Tensor | None = None,
        **kwargs,
    ):
        """Logits over text and image positions, and the loss of the answer.

        Args:
            input_ids: [B, S] int64, IMAGE_TOKEN_INDEX marks each image.
            past_key_values: a transformers Cache, or (key, value) pairs [B, H, T, hd].
            attention_mask: [B, S], 1 = real; padding on either side. On top of a cache [B, cached + S].
            prefix_mask: [B, S], 1 = visible to every query; an image takes its placeholder's value. Default: what
                ``config.mm_prefix`` says; 'prompt' is, with labels, all real tokens before the first label, without,
                all real tokens.
            labels: [B, S] int64, IGNORE_INDEX on what is not answered.
            images: [n, C, H, W], [b, n, C, H, W] or a list; see ``image_slots``.
            kwargs: of MPTForCausalLM.
        Returns: as MPTForCausalLM, over the fused length L; past_key_values is a transformers Cache.
        Raises: ValueError (shapes, token ids, number of images, cache of another model).
        """
        config, given = self.config, input_ids if inputs_embeds is None else inputs_embeds
        use_cache = config.use_cache if use_cache is None else use_cache
        if past_key_values is not None and given is not None:
            past_key_values = as_cache(
                past_key_values, config.n_layers, config.num_key_value_heads, config.head_dim, given.shape[0]
            )
        elif use_cache and not (self.training and self.transformer.gradient_checkpointing):
            past_key_values = DynamicCache()
        step = self.step_inputs(input_ids, attention_mask, past_key_values, inputs_embeds, labels, images, prefix_mask)
        return super().forward(
            input_ids=step.input_ids,
            past_key_values=past_key_values,
            attention_mask=step.attention_mask,
            prefix_mask=step.prefix_mask,
            labels=step.labels,
            return_dict=return_dict,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            use_cache=use_cache,
            inputs_embeds=step.inputs_embeds,
            **kwargs,
        )


class LlavaMptPrefixModel(LlavaMptModel):
    """LlavaMptModel with LlavaMptPrefixConfig."""

    config_class = LlavaMptPrefixConfig


class LlavaMptPrefixForCausalLM(LlavaMptForCausalLM):
    """LlavaMptForCausalLM with LlavaMptPrefixConfig."""

    config_class = LlavaMptPrefixConfig
    inner_model_class = LlavaMptPrefixModel


for _config, _model in (
    (LlavaMptConfig, LlavaMptForCausalLM),
    (LlavaMptPrefixConfig, LlavaMptPrefixForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
