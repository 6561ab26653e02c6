"""``generate`` for MPT: what is fed at each step, and which prompt keys stay open to every query."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache

from .cache import Past, cached_length


class MPTGenerationMixin:
    """Mixed into a language model before ``GenerationMixin``."""

    def generate(self, inputs: Tensor | None = None, generation_config=None, **kwargs):
        """``GenerationMixin.generate``; a cache is used unless ``use_cache=False``.

        With prefix_lm the prompt is the prefix: ``prefix_mask`` [B, prompt] names other bidirectional prompt
        tokens. Generated tokens are causal, so each sees everything before it.
        Raises: ValueError (two kinds of prompt at once).
        """
        if generation_config is None:
            kwargs.setdefault("use_cache", True)
        prompts = [t for t in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), inputs) if t is not None]
        if len(prompts) > 1:
            raise ValueError("generate got more than one of inputs, input_ids and inputs_embeds; pass one of them")
        if prompts and self.config.attn_config["prefix_lm"] and kwargs.get("prefix_mask") is None:
            kwargs["prefix_mask"] = torch.ones(prompts[0].shape[:2], dtype=torch.bool, device=prompts[0].device)
        return super().generate(inputs, generation_config, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Past = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> dict:
        """One step's arguments of ``forward``: the tokens that the cache does not hold, and masks over all keys.

        A ``prefix_mask`` shorter than the keys is continued with zeros (causal tokens), a ``sequence_id`` with
        its last column.
        Raises: NotImplementedError (right padding; prefix_lm without a cache or a ``prefix_mask``).
        """
        if inputs_embeds is not None and not self.accepts_inputs_embeds:
            raise NotImplementedError("inputs_embeds was given; MPTForCausalLM generates from input_ids only")
        past = cached_length(past_key_values, self.transformer.attn_impl)
        # transformers drops a mask of ones, so the length comes from the tokens when there is no mask.
        keys = input_ids.shape[1] + (0 if inputs_embeds is None else inputs_embeds.shape[1])
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
            keys = attention_mask.shape[1]
            if not bool(attention_mask[:, -1].all()):
                raise NotImplementedError("attention_mask pads on the right; generation needs padding on the left")
        if past:
            tokens = {"input_ids": input_ids[:, past - keys :]}
        elif inputs_embeds is None:
            tokens = {"input_ids": input_ids}
        else:  # without a cache the generated tokens follow the prompt's embeddings
            new = self.get_input_embeddings()(input_ids)
            tokens = {"inputs_embeds": torch.cat([inputs_embeds, new.to(inputs_embeds.dtype)], 1)}
        if self.config.attn_config["prefix_lm"]:
            if prefix_mask is None:
                if use_cache is False:
                    raise NotImplementedError("use_cache is False; prefix_lm then needs prefix_mask, the prompt's keys")
                prefix_mask = input_ids.new_ones(input_ids.shape[0], keys)
            prefix_mask = functional.pad(prefix_mask.bool(), (0, keys - prefix_mask.shape[1]))
        if sequence_id is not None:
            last = sequence_id[:, -1:].expand(-1, keys - sequence_id.shape[1])
            sequence_id = torch.cat([sequence_id, last], 1)
        kept = {name: kwargs[name] for name in ("logits_to_keep",) if name in kwargs}
        return {
            **tokens,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "prefix_mask": prefix_mask,
            "sequence_id": sequence_id,
            "use_cache": use_cache,
            **kept,
        }

    @staticmethod
    def _reorder_cache(past_key_values: Past, beam_idx: Tensor):
        """The cache with its rows in the order of ``beam_idx``."""
        if isinstance(past_key_values, Cache):
            past_key_values.reorder_cache(beam_idx)
            return past_key_values
        return [tuple(t.index_select(0, beam_idx.to(t.device)) for t in slot) for slot in past_key_values]
