"""The inner model of Q-LLaMA: a LLaMA whose first positions, the query tokens, also attend to vision states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from ..checkpoint import CheckedLoading
from .cache import Past, open_past
from .configuration_qllama import QLlamaConfig
from .inputs import block_rows, check_mask, check_positions, check_vision, token_embeddings
from .layers import LlamaDecoderLayer, LlamaRMSNorm
from .masks import dense_mask, full_mask, recognise, self_mask
from .rotary import LlamaRotaryEmbedding

logger = logging.get_logger(__name__)


class LlamaPreTrainedModel(CheckedLoading, PreTrainedModel):
    """What both model classes share with transformers."""

    config_class = QLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer"]  # noqa: RUF012  (transformers reads these from the class)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012  (files of older transformers)
    _can_compile_fullgraph = True


class LlamaModel(LlamaPreTrainedModel):
    """The inner model: embeddings, layers, final norm."""

    def __init__(self, config: QLlamaConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config, use_cross_attn=i % config.cross_attention_frequency == 0)
            for i in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.rotary_emb = LlamaRotaryEmbedding(head_dim, config.max_position_embeddings, config=config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        vision_hidden_states: Tensor | None = None,
        repeat_time: int = 1,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        use_zero_attention_mask: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Causal attention; the query block sees all of itself on request.

        The block is the first ``num_query_token`` positions of the sequence, cached tokens included; its rows attend to
        the vision states. A first chunk shorter than the block is text, which skips them, as does what follows the
        block. With an ``EncoderDecoderCache`` the sequence is known to begin with the block: chunks may cut it.

        Args:
            input_ids: [B, S] int64, or inputs_embeds [B, S, hidden_size].
            attention_mask: [B, T] bool or int, 1 = real; T counts cached tokens too.
            position_ids: [1 or B, S] for the rotary positions. Default: those after the cached tokens.
            past_key_values: see ``cache.py``.
            vision_hidden_states: [B / repeat_time, Nv, vision_hidden_size].
            repeat_time: texts per image, text-major: sample r * Bv + b belongs to image b; nothing is copied.
            use_zero_attention_mask: query tokens see every query token, also one that attention_mask hides.
        Returns: last_hidden_state [B, S, hidden_size] after the norm; past_key_values with ``use_cache``;
            hidden_states (input of every layer, then the result); attentions (in dense memory, when asked for).
        Raises: ValueError (shapes, widths, ids out of range, caches that do not fit, a block cut by a chunk).
        """
        embeds = token_embeddings(self.embed_tokens, input_ids, inputs_embeds)
        past, use_cache = self._open(past_key_values, use_cache, embeds)
        output_attentions = self._asked(output_attentions, "output_attentions")
        num_query_token = self.config.num_query_token if use_zero_attention_mask else 0
        shape = tuple(embeds.shape[:2])
        attention_mask = check_mask(attention_mask, shape, past.start, past.capacity)
        if output_attentions:
            mask = dense_mask(shape, int(past.start), attention_mask, num_query_token, embeds)
        else:
            mask = self_mask(shape, past.start, attention_mask, num_query_token)
        return self._run(
            *(embeds, mask, past, position_ids, vision_hidden_states, repeat_time, use_cache),
            *(
                output_attentions,
                self._asked(output_hidden_states, "output_hidden_states"),
                return_dict,
                bool(use_zero_attention_mask),
            ),
        )

    def forward_train(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        vision_hidden_states: Tensor | None = None,
        repeat_time: int = 1,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """``forward`` under a mask of the caller's: None = every token sees every token, else additive [B, 1, S, T].

        A mask in host memory that is causal, a prefix, padding, or any mix of these runs in the kernels. Any other
        mask, one on a GPU, and one inside a compiled graph take dense attention.
        Raises: ValueError, as ``forward``.
        """
        embeds = token_embeddings(self.embed_tokens, input_ids, inputs_embeds)
        past, use_cache = self._open(past_key_values, use_cache, embeds)
        output_attentions = self._asked(output_attentions, "output_attentions")
        batch, seqlen = embeds.shape[:2]
        total = int(past.start) + seqlen
        mask = attention_mask
        if mask is not None and tuple(mask.shape) != (batch, 1, seqlen, total):
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)}; expected [batch, 1, queries, keys] = "
                f"{[batch, 1, seqlen, total]}, cached keys included"
            )
        if not output_attentions:
            mask = full_mask(seqlen, total) if mask is None else recognise(mask) or mask
        return self._run(
            *(embeds, mask, past, position_ids, vision_hidden_states, repeat_time, use_cache),
            *(output_attentions, output_hidden_states, return_dict),
        )

    def _asked(self, given: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name, False) if given is None else given)

    def _open(self, past_key_values, use_cache: bool | None, embeds: Tensor) -> tuple[Past, bool]:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self._checkpoints() and (use_cache or past_key_values is not None):
            logger.warning_once("use_cache is off while training with gradient checkpointing")
            use_cache, past_key_values = False, None
        past = open_past(past_key_values, use_cache, self.config, tuple(embeds.shape[:2]))
        return past, use_cache

    def _checkpoints(self) -> bool:
        return self.training and any(layer.gradient_checkpointing for layer in self.layers)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the layers recompute their activations in training; may be set by hand."""
        return any(layer.gradient_checkpointing for layer in self.layers)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        for layer in self.layers:
            if not hasattr(layer, "_gradient_checkpointing_func"):
                layer._gradient_checkpointing_func = _checkpoint
            layer.gradient_checkpointing = value

    def _run(
        self,
        embeds: Tensor,
        mask,
        past: Past,
        position_ids: Tensor | None,
        vision_hidden_states: Tensor | None,
        repeat_time: int,
        use_cache: bool,
        output_attentions: bool,
        output_hidden_states: bool | None,
        return_dict: bool | None,
        zero_mask: bool = False,
    ):
        config, seqlen = self.config, embeds.shape[1]
        output_hidden_states = self._asked(output_hidden_states, "output_hidden_states")
        vision = check_vision(config, vision_hidden_states, repeat_time, embeds, past.has_vision())
        position_ids = check_positions(position_ids, tuple(embeds.shape[:2]), past.start, embeds.device)
        capacity = past.start + seqlen if isinstance(past.start, int) else past.capacity
        rope = self.rotary_emb.tables(position_ids, capacity, embeds.dtype)
        query_rows = block_rows(config.num_query_token, past, seqlen, vision is not None, zero_mask)
        x = embeds
        if self._checkpoints() and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # else reentrant checkpoints would give the parameters no gradient

        hidden_states, attentions = [], []
        for index, layer in enumerate(self.layers):
            hidden_states.append(x)
            outputs = layer(
                x,
                vision,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_value=past.slot(index),
                output_attentions=output_attentions,
                use_cache=use_cache,
                repeat_time=repeat_time,
                query_rows=query_rows,
                vision_key_value=past.vision_slot(index),
                position_embeddings=rope,
            )
            x = outputs[0]
            attentions.append(outputs[1] if output_attentions else None)
            if not output_hidden_states:
                hidden_states.clear()
        x = self.norm(x)
        result = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past.result() if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return result.to_tuple() if return_dict is False else result


def _checkpoint(function, *args):
    """What a flag set by hand uses; ``gradient_checkpointing_enable`` brings its own."""
    return checkpoint(function, *args, use_reentrant=False)
