"""LLaVA over LLaMA: transformers' LlamaModel with a vision tower, on the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.cache_utils import Cache

from ... import semantics
from .. import hf_attention
from ..hf_attention import carrier
from .cache import as_cache, buffer_length, cache_length
from .configuration import LlavaConfig
from .meta import LlavaMetaModel
from .multimodal import LlavaMultimodal

hf_attention.register()


def _default_to_kernels(config: LlavaConfig) -> None:
    if config._attn_implementation is None:  # nobody asked for another one
        config._attn_implementation = hf_attention.NAME


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """LlamaModel with ``vision_tower`` and ``mm_projector``."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig):
        _default_to_kernels(config)
        super().__init__(config)


class LlavaLlamaForCausalLM(LlavaMultimodal, LlamaForCausalLM):
    """LLaMA that reads images. Attention is grouped-query, rotary, and never forms an S x S mask.

    Keys: ``model.*``, ``lm_head.weight``, ``model.mm_projector.*``, ``model.vision_tower.vision_tower.*``.
    ``attn_implementation`` is 'internvl' (the fused kernels) unless another one is asked for.
    """

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig):
        _default_to_kernels(config)
        super(LlamaForCausalLM, self).__init__(config)  # past LlamaForCausalLM, which would build its own LlamaModel
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self) -> LlavaLlamaModel:
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Tensor | list[Tensor] | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        **kwargs,
    ):
        """Logits over text and image positions, and the loss of the answer.

        Args:
            input_ids: [B, S] int64, IMAGE_TOKEN_INDEX marks each image.
            attention_mask: [B, S], 1 = real; padding on either side. On top of a cache [B, cached + S].
            past_key_values: a transformers Cache, or (key, value) pairs [B, Hkv, T, hd].
            labels: [B, S] int64, IGNORE_INDEX on what is not answered.
            images: [n, C, H, W], [b, n, C, H, W] or a list; see ``image_slots``.
            position_ids: of the fused sequence. Default: real tokens counted from 0.
            prefix_mask: [B, S], 1 = visible to every query; an image takes its placeholder's value. Default: what
                ``config.mm_prefix`` says.
            kwargs: of LlamaForCausalLM.
        Returns: as LlamaForCausalLM, over the fused length L.
        Raises: ValueError (shapes, token ids, number of images, cache of another model).
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None and past_key_values is not None:
            config = self.config
            past_key_values = as_cache(
                past_key_values,
                config.num_hidden_layers,
                config.num_key_value_heads,
                getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
                given.shape[0],
            )
        step = self.step_inputs(input_ids, attention_mask, past_key_values, inputs_embeds, labels, images, prefix_mask)
        mask, seqlen = step.attention_mask, step.shape[1]
        if position_ids is None and mask is not None and mask.dim() == 2:
            leading = ((mask != 0).cumsum(1) == 0).sum(1, keepdim=True)  # padding before the first real token
            position_ids = (torch.arange(mask.shape[1], device=mask.device) - leading).clamp(min=0)[:, -seqlen:]
        if step.prefix_mask is not None and (mask is None or mask.dim() == 2):
            mask = self._prefix_attention_mask(step.prefix_mask, mask, past_key_values, step.shape)
        flags = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        return super().forward(
            input_ids=step.input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=step.inputs_embeds,
            labels=step.labels,
            use_cache=use_cache,
            **{name: value for name, value in (*flags.items(), ("return_dict", return_dict)) if value is not None},
            **kwargs,
        )

    def _prefix_attention_mask(
        self, prefix_mask: Tensor, attention_mask: Tensor | None, cache: Cache | None, shape: tuple[int, int]
    ) -> Tensor:
        """The prefix as this model's attention takes it: key flags, or S x S for transformers' own attention.

        Raises: ValueError (an ``attn_implementation`` without arbitrary masks).
        """
        total = prefix_mask.shape[1]
        real = torch.ones_like(prefix_mask, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        flags = real * (semantics.FLAG_VALID + (prefix_mask != 0) * semantics.FLAG_BIDIRECTIONAL)
        keys = buffer_length(cache) or total
        flags = functional.pad(flags, (0, keys - total)).to(torch.uint8)
        name = self.config._attn_implementation
        if name == hf_attention.NAME:
            written = None if keys == total else torch.arange(keys, device=flags.device)[None] < total
            return carrier.encode(flags, written)
        if name not in ("eager", "sdpa"):
            raise ValueError(
                f"attn_implementation is {name!r}; with mm_prefix = {self.config.mm_prefix!r} "
                f"{hf_attention.NAME!r}, 'sdpa' and 'eager' are allowed"
            )
        start = torch.full((shape[0],), total - shape[1], dtype=torch.int32, device=flags.device)
        terms = {"key_flags": flags, "query_start": start, "device": flags.device}
        seen = semantics.visible_mask(shape[0], shape[1], keys, **terms)[:, None]
        if name == "sdpa":
            return seen
        return torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill(
            ~seen, torch.finfo(self.dtype).min
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        **kwargs,
    ) -> dict:
        """As in transformers; with a prefix the masks stay [B, keys] and generated tokens are causal."""
        kwargs |= {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if self.config.mm_prefix is None or prefix_mask is None:
            return inputs
        fed = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        total = fed.shape[1] + cache_length(inputs.get("past_key_values"))
        inputs["prefix_mask"] = functional.pad(prefix_mask, (0, total - prefix_mask.shape[1]))
        inputs["attention_mask"] = attention_mask
        return inputs


AutoConfig.register(LlavaConfig.model_type, LlavaConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM, exist_ok=True)
