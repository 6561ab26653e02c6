"""MPT: the inner transformer and the causal (or prefix) language model on top of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from ..checkpoint import CheckedLoading
from ..inputs import check_given, check_labels
from .alibi import check_attn_impl
from .blocks import MPTBlock
from .cache import Past, cached_length, check_past, layer_slots
from .configuration_mpt import MPTConfig
from .custom_embedding import SharedEmbedding
from .generation import MPTGenerationMixin
from .mask_inputs import MaskInputs
from .norm import norm_class
from .param_init_fns import init_module

logger = logging.get_logger(__name__)


class MPTPreTrainedModel(CheckedLoading, PreTrainedModel):
    """What both model classes share with transformers."""

    config_class = MPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]  # noqa: RUF012  (transformers' name of the table)
    _no_split_modules = ["MPTBlock"]  # noqa: RUF012  (transformers reads it from the class)

    def _init_weights(self, module: nn.Module) -> None:
        init_module(module, self.config)

    def set_attn_impl(self, attn_impl: str) -> None:
        """Run every block with 'torch', 'flash' or 'triton' from now on; weights and config stay as they are.

        Tensor caches of another layout do not carry over; a transformers ``Cache`` does.
        Raises: ValueError (unknown name).
        """
        check_attn_impl(attn_impl)
        for module in self.modules():
            if hasattr(module, "attn_impl"):
                module.attn_impl = attn_impl


class MPTModel(MPTPreTrainedModel):
    """The inner transformer: embeddings, blocks, final norm.

    Raises: NotImplementedError (unknown ``norm_type``).
    """

    def __init__(self, config: MPTConfig):
        super().__init__(config)
        device = _init_device(config.init_device)
        norm = norm_class(config.norm_type)
        attn = config.attn_config
        self.attn_impl = attn["attn_impl"]
        self.prefix_lm = attn["prefix_lm"]
        self.alibi = attn["alibi"]
        self.is_causal = not self.prefix_lm
        self.wte = SharedEmbedding(config.vocab_size, config.d_model, device=device)
        if not self.alibi:
            self.wpe = nn.Embedding(config.max_seq_len, config.d_model, device=device)
        self.emb_drop = nn.Dropout(config.emb_pdrop)
        self.blocks = nn.ModuleList(
            MPTBlock(
                d_model=config.d_model,
                n_heads=config.n_heads,
                expansion_ratio=config.expansion_ratio,
                attn_config=attn,
                resid_pdrop=config.resid_pdrop,
                norm_type=config.norm_type,
                device=device,
                layer_norm_epsilon=config.layer_norm_epsilon,
            )
            for _ in range(config.n_layers)
        )
        self.norm_f = norm(config.d_model, eps=config.layer_norm_epsilon, device=device)
        self.gradient_checkpointing = False
        if config.no_bias:
            for module in self.modules():
                if isinstance(getattr(module, "bias", None), nn.Parameter):
                    module.register_parameter("bias", None)
        self.post_init()

    def get_input_embeddings(self) -> SharedEmbedding:
        return self.wte

    def set_input_embeddings(self, value: SharedEmbedding) -> None:
        self.wte = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Past = None,
        attention_mask: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """Args:
            input_ids: [B, S] int64.
            past_key_values: transformers ``Cache`` (filled in place), or one slot per layer (not changed).
            attention_mask: [B, T] bool or int, 1 = real; T counts cached keys too. Left padding only in eval.
            prefix_mask: [B, T], 1 = visible to every query; holes allowed. Required with prefix_lm.
            sequence_id: [B, T] int, packed documents, with attn_uses_sequence_id.
            inputs_embeds: [B, S, D] instead of ``input_ids``; needs ALiBi.
        Returns: last_hidden_state [B, S, D]; past_key_values (the Cache, or a list of slots); hidden_states (input
            of every block, then the result); attentions ('torch' only).
        Raises: ValueError, AssertionError (input longer than max_seq_len, inputs_embeds without ALiBi),
            NotImplementedError (return_dict=False, output_attentions on fused paths, left padding in training).
        """
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_hidden_states = bool(output_hidden_states)
        output_attentions = bool(output_attentions)
        if return_dict is False:
            raise NotImplementedError("return_dict is False; MPT models return output objects only")
        if output_attentions and self.attn_impl != "torch":
            raise NotImplementedError(
                f"output_attentions is True; attn_impl={self.attn_impl!r} never forms the weights: use 'torch'"
            )
        if self.gradient_checkpointing and self.training and use_cache:
            logger.warning_once("use_cache is off while training with gradient checkpointing")
            use_cache, past_key_values = False, None
        if inputs_embeds is not None:
            assert input_ids is None and self.alibi, "inputs_embeds needs input_ids to be None and ALiBi positions"
        batch, seqlen = check_given(input_ids, inputs_embeds, self.wte.num_embeddings, config.d_model)
        check_past(past_key_values, config, batch, seqlen, self.attn_impl)
        past = cached_length(past_key_values, self.attn_impl)
        slots = layer_slots(past_key_values, config.n_layers, use_cache, past)
        self._check_length(past, seqlen)
        masks = MaskInputs.check(
            config, self.training, (batch, past + seqlen), attention_mask, prefix_mask, sequence_id
        )
        x = self._embed(input_ids, inputs_embeds, masks.attention_mask, past)
        if self.attn_impl == "torch":
            attn_bias = masks.dense_bias(config, seqlen, past + seqlen, x.device)
        else:
            attn_bias = masks.fused_bias(config, x.device)

        hidden_states, attentions, new_slots = [], [], []
        for layer, block in enumerate(self.blocks):
            if output_hidden_states:
                hidden_states.append(x)
            x, weights, slot = block(
                x,
                past_key_value=None if slots is None else slots[layer],
                attn_bias=attn_bias,
                is_causal=self.is_causal,
                output_attentions=output_attentions,
            )
            attentions.append(weights)
            new_slots.append(slot)
        x = self.norm_f(x)
        if output_hidden_states:
            hidden_states.append(x)
        if isinstance(past_key_values, Cache):
            new_slots = past_key_values
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=None if slots is None else new_slots,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _check_length(self, past: int, seqlen: int) -> None:
        """The position table, and the dense bias of the original, end at max_seq_len; fused ALiBi has no end."""
        longest = self.config.max_seq_len
        if self.alibi and self.attn_impl != "torch":
            return
        assert seqlen <= longest, f"the input has {seqlen} tokens; max_seq_len is {longest}"
        if past + seqlen > longest:
            kind = RuntimeError if self.alibi else ValueError
            raise kind(f"{past} cached and {seqlen} new tokens exceed max_seq_len = {longest}")

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None, past: int
    ) -> Tensor:
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if not self.alibi:
            position = torch.arange(past, past + x.shape[1], device=x.device)[None]
            if attention_mask is not None:  # padding so far shifts a row's positions back
                position = (position - (~attention_mask).cumsum(1)[:, past:]).clamp(min=0)
            x = x + self.wpe(position)
        fraction = self.config.embedding_fraction
        if fraction < 1:
            x = x * fraction + x.detach() * (1 - fraction)
        return self.emb_drop(x)


class MPTForCausalLM(MPTGenerationMixin, MPTPreTrainedModel, GenerationMixin):
    """MPT with its embedding table as the output head.

    A subclass that builds its own embeddings (a vision-language model) sets ``accepts_inputs_embeds``: ``forward``
    and ``generate`` then take ``inputs_embeds`` with ``attention_mask`` and ``prefix_mask`` of the same length.
    Raises: ValueError (``tie_word_embeddings`` False); as ``MPTModel``.
    """

    accepts_inputs_embeds = False
    inner_model_class: type[MPTModel] = MPTModel

    def __init__(self, config: MPTConfig):
        super().__init__(config)
        if not getattr(config, "tie_word_embeddings", True):
            raise ValueError("tie_word_embeddings is False; MPT scores tokens with its embedding table")
        self.transformer = self.inner_model_class(config)
        scale = config.logit_scale
        self.logit_scale = 1 / math.sqrt(config.d_model) if scale == "inv_sqrt_d_model" else scale
        self.register_load_state_dict_pre_hook(_drop_tied_head)
        self.post_init()

    def get_input_embeddings(self) -> SharedEmbedding:
        return self.transformer.wte

    def set_input_embeddings(self, value: SharedEmbedding) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> SharedEmbedding:
        return self.transformer.wte

    def set_output_embeddings(self, new_embeddings: SharedEmbedding) -> None:
        self.transformer.wte = new_embeddings

    def get_decoder(self) -> MPTModel:
        return self.transformer

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Past = None,
        attention_mask: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Args:
            labels: [B, S] int64, -100 = ignored; shifted here, not changed.
            logits_to_keep: score only the last so many positions; 0 = all.
            Others: as ``MPTModel.forward``.
        Returns: logits [B, S, V]; loss (mean next-token cross entropy) with labels; the rest as ``MPTModel``.
        """
        if inputs_embeds is not None and not self.accepts_inputs_embeds:
            raise NotImplementedError("inputs_embeds was given; MPTForCausalLM takes input_ids, MPTModel takes both")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None:
            check_labels(labels, self.transformer.wte.num_embeddings, tuple(given.shape[:2]))
        outputs = self.transformer(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            prefix_mask=prefix_mask,
            sequence_id=sequence_id,
            return_dict=return_dict,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
        )
        hidden = outputs.last_hidden_state
        logits = self.transformer.wte(hidden[:, -logits_to_keep:] if logits_to_keep else hidden, unembed=True)
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _drop_tied_head(_module: nn.Module, state: dict, prefix: str, *_) -> None:
    """transformers' MPT repeats the embedding table as its head. Raises: ValueError when the two differ."""
    head, table = state.pop(prefix + "lm_head.weight", None), state.get(prefix + "transformer.wte.weight")
    if head is not None and table is not None and not torch.equal(head, table):
        raise ValueError(
            "lm_head.weight differs from transformer.wte.weight; MPT scores tokens with its embedding table"
        )


def _init_device(name: str) -> str | None:
    """Where parameters are made; None leaves it to the caller's ``torch.device`` context."""
    if name == "mixed":
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        name = "meta" if ready and torch.distributed.get_rank() else "cpu"
    return "meta" if name == "meta" else None
