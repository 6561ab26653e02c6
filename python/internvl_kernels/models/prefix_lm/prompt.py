"""What ``generate`` of a converted model takes as the prefix, and what it refuses."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from .carriers import PrefixLMError, check_bidirectional_mask

DEFAULT_NEW = 20  # what transformers generates when nothing says how long


def setting(model: PreTrainedModel, kwargs: dict, name: str):
    """A generation setting: the keyword, else that of the configuration given, else the model's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    config = kwargs.get("generation_config") or model.generation_config
    return getattr(config, name, None)


def check_generation(model: PreTrainedModel, kwargs: dict) -> None:
    """Raises ValueError for settings under which a prefix would be lost."""
    chunk = setting(model, kwargs, "prefill_chunk_size")
    if chunk is not None:
        raise PrefixLMError(
            f"prefill_chunk_size is {chunk}; a prompt that is read in chunks cannot be seen in both directions"
        )
    cache = setting(model, kwargs, "cache_implementation")
    if cache not in (None, "dynamic", "static") and has_window(model.config):
        raise PrefixLMError(
            f"cache_implementation is {cache!r} on a model with sliding windows: its cache drops a prefix that is "
            "older than the window; allowed: 'dynamic', 'static'"
        )
    assistant = kwargs.get("assistant_model")
    if assistant is not None and not getattr(assistant, "_prefix_lm_converted", False):
        raise PrefixLMError("assistant_model is not a prefix LM; convert it as well")


def _prompt(inputs: Tensor | None, kwargs: dict) -> Tensor | None:
    """Token ids [B, S] or embeddings [B, S, hidden]; None: generate begins with the start token alone."""
    given = (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids"))
    return next((x for x in given if x is not None), None)


def prompt_length(inputs: Tensor | None, kwargs: dict) -> int:
    """Tokens of the prompt, cached ones left out."""
    prompt = _prompt(inputs, kwargs)
    return 1 if prompt is None else prompt.shape[1]


def check_prompt_mask(model: PreTrainedModel, mask: Tensor, inputs: Tensor | None, kwargs: dict) -> None:
    """Raises TypeError or ValueError: not [batch, keys], or opens places that tokens are only generated into."""
    prompt, attention_mask, past = _prompt(inputs, kwargs), kwargs.get("attention_mask"), kwargs.get("past_key_values")
    check_bidirectional_mask(mask, 1 if prompt is None else prompt.shape[0], model.config)
    if attention_mask is not None:
        keys = attention_mask.shape[1]
    else:
        keys = prompt_length(inputs, kwargs) + (int(past.get_seq_length()) if isinstance(past, Cache) else 0)
    if mask.shape[1] > keys:
        raise PrefixLMError(
            f"bidirectional_mask covers {mask.shape[1]} keys, the prompt {keys}; what is generated is causal"
        )


def has_window(config) -> bool:
    return bool(getattr(config, "sliding_window", None))


def full_cache(model: PreTrainedModel, kwargs: dict, prompt: int) -> Cache:
    """A cache for a model with windows that keeps every key, as ``cache_implementation`` in ``kwargs`` asks for it.

    transformers would give windowed layers a buffer as long as the window, which loses an older prefix.
    """
    assisted = kwargs.get("assistant_model") is not None or setting(model, kwargs, "prompt_lookup_num_tokens")
    if setting(model, kwargs, "cache_implementation") != "static" or assisted:  # assistants take tokens back
        return DynamicCache()
    new, total = setting(model, kwargs, "max_new_tokens"), setting(model, kwargs, "max_length")
    config = copy.deepcopy(model.config.get_text_config(decoder=True))
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    return StaticCache(config=config, max_cache_len=prompt + new if new else max(total or 0, prompt + DEFAULT_NEW))


def prompt_mask(model: PreTrainedModel, inputs: Tensor | None, kwargs: dict) -> Tensor | None:
    """bool [B, prompt]: attention_mask, else what generate itself takes for real tokens; None without a prompt."""
    if kwargs.get("attention_mask") is not None:
        return kwargs["attention_mask"] != 0
    embeds = kwargs.get("inputs_embeds")
    if embeds is not None:
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    ids = kwargs.get("input_ids") if inputs is None else inputs
    if ids is None:
        return None
    pad, eos = setting(model, kwargs, "pad_token_id"), setting(model, kwargs, "eos_token_id")
    ends = eos if isinstance(eos, list | tuple) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(ids, dtype=torch.bool)
    return ids != pad
