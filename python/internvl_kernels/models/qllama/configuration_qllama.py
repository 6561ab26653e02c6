"""Configuration of Q-LLaMA."""

from __future__ import annotations

from transformers import LlamaConfig


class QLlamaConfig(LlamaConfig):
    """LLaMA configuration plus the query block.

    Args:
        num_query_token: the first so many positions are query tokens: they attend to the vision states, and to each
            other in both directions under ``use_zero_attention_mask``.
        cross_attention_frequency: layers 0, f, 2f, ... have cross attention.
        vision_hidden_size: width of the vision states.
        kwargs: of LlamaConfig; grouped key-value heads, biases and rope scaling are honoured.
    Raises: ValueError (a value out of range).
    """

    model_type = "qllama"

    def __init__(
        self,
        num_query_token: int = 96,
        cross_attention_frequency: int = 2,
        vision_hidden_size: int = 3200,
        **kwargs,
    ):
        self.num_query_token = num_query_token
        self.cross_attention_frequency = cross_attention_frequency
        self.vision_hidden_size = vision_hidden_size
        self._check(kwargs)
        super().__init__(**kwargs)

    def _check(self, sizes: dict) -> None:
        smallest = {"num_query_token": 0, "cross_attention_frequency": 1, "vision_hidden_size": 1}
        for name, least in smallest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")
        hidden_size = sizes.get("hidden_size", 4096)  # LLaMA's defaults
        heads = sizes.get("num_attention_heads", 32)
        kv_heads = sizes.get("num_key_value_heads") or heads
        if hidden_size % heads and not sizes.get("head_dim"):
            raise ValueError(f"hidden_size is {hidden_size}; it must be a multiple of num_attention_heads = {heads}")
        if heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads is {kv_heads}; num_attention_heads = {heads} must be a multiple of it"
            )
