"""``generate`` for Q-LLaMA: what is fed at each step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache

from .cache import past_length


class QLlamaGenerationMixin:
    """Mixed into a language model before ``GenerationMixin``."""

    def generate(self, inputs: Tensor | None = None, generation_config=None, **kwargs):
        """``GenerationMixin.generate`` with ``vision_hidden_states``, ``repeat_time``, ``use_zero_attention_mask``.

        The prompt (``input_ids`` or ``inputs_embeds``) begins with the query tokens when there are vision states.
        Returns: from ``inputs_embeds`` the new tokens only, else the prompt and the new tokens.
        """
        repeat_time = kwargs.pop("repeat_time", 1)
        if repeat_time != 1 and kwargs.get("vision_hidden_states") is not None:
            # beams repeat each sample in place, which the text-major order of repeat_time does not survive
            kwargs["vision_hidden_states"] = kwargs["vision_hidden_states"].repeat(repeat_time, 1, 1)
        return super().generate(inputs, generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        vision_hidden_states: Tensor | None = None,
        use_zero_attention_mask: bool | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        next_sequence_length: int | None = None,
        **kwargs,
    ) -> dict:
        """One step's arguments of ``forward``: the tokens that the cache does not hold, and a mask over all keys.

        Positions count the real tokens before each one; padding stands at position 1.
        """
        past = past_length(past_key_values)
        # transformers drops a mask of ones, so the length comes from the tokens when there is no mask
        keys = input_ids.shape[1] + (0 if inputs_embeds is None else inputs_embeds.shape[1])
        keys = keys if attention_mask is None else attention_mask.shape[1]
        if past:
            fresh = keys - past if next_sequence_length is None else next_sequence_length
            tokens = {"input_ids": input_ids[:, input_ids.shape[1] - fresh :]}
        elif inputs_embeds is None:
            tokens = {"input_ids": input_ids}
        else:  # without a cache the generated tokens follow the prompt's embeddings
            new = self.get_input_embeddings()(input_ids)
            tokens = {"inputs_embeds": torch.cat([inputs_embeds, new.to(inputs_embeds.dtype)], 1)}
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(1) - 1).masked_fill(attention_mask == 0, 1)
            tokens["position_ids"] = positions[:, past:]
            attention_mask = _over_the_buffer(attention_mask, past_key_values)
        kept = {name: kwargs[name] for name in ("logits_to_keep", "output_attentions") if name in kwargs}
        kept |= {name: kwargs[name] for name in ("output_hidden_states", "return_dict") if name in kwargs}
        return {
            **tokens,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "vision_hidden_states": vision_hidden_states,
            "use_zero_attention_mask": use_zero_attention_mask,
            "use_cache": use_cache,
            **kept,
        }

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx: Tensor):
        """The cache with its rows in the order of ``beam_idx``."""
        if isinstance(past_key_values, Cache):
            past_key_values.reorder_cache(beam_idx)
            return past_key_values
        return tuple(tuple(t.index_select(0, beam_idx.to(t.device)) for t in pair) for pair in past_key_values)


def _over_the_buffer(attention_mask: Tensor, past_key_values) -> Tensor:
    """A static cache's mask covers its whole buffer: one shape for every step, so that a compiled step is reused."""
    if not isinstance(past_key_values, Cache) or not past_key_values.is_compileable:
        return attention_mask
    capacity = getattr(past_key_values.layers[0], "max_cache_len", None) if past_key_values.layers else None
    if capacity is None:
        return attention_mask
    return functional.pad(attention_mask, (0, capacity - attention_mask.shape[1]))
