"""InternVL-14B: InternViT read by the query tokens of a Q-LLaMA."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..checkpoint import CheckedLoading
from ..qllama import LlamaForCausalLM
from .configuration_internvl import InternVLConfig
from .lora import ALPHA, DROPOUT, QLLAMA_TARGETS, VISION_TARGETS, with_lora
from .modeling_intern_vit import InternVisionModel, init_vision_weights
from .pooling import AttentionPoolingBlock, AttentiveBlock, CrossAttention

# the original's module holds the pooling block too
__all__ = ["AttentionPoolingBlock", "AttentiveBlock", "CrossAttention", "InternVLModel", "InternVLPreTrainedModel"]


class InternVLPreTrainedModel(CheckedLoading, PreTrainedModel):
    """What the model shares with transformers."""

    config_class = InternVLConfig
    base_model_prefix = "internvl"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVisionEncoderLayer", "LlamaDecoderLayer"]  # noqa: RUF012  (read from the class)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012  (files of older transformers)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_vision_weights(module, self.config.vision_config)
        if isinstance(module, InternVLModel):
            nn.init.zeros_(module.query_tokens)


class InternVLModel(InternVLPreTrainedModel):
    """Image and text features, and text generated from an image.

    Keys: ``vision_model.*``, ``qllama.*`` (a Q-LLaMA language model), ``query_tokens``.
    """

    def __init__(self, config: InternVLConfig):
        super().__init__(config)
        self.num_query_token = config.num_query_token
        self.label_smoothing = config.label_smoothing
        self.vision_model = InternVisionModel(config.vision_config)
        self.qllama = LlamaForCausalLM(config.qllama_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_token, config.hidden_size))
        self.post_init()
        if config.use_backbone_lora:
            self.wrap_backbone_lora(r=config.use_backbone_lora)
        if config.use_qllama_lora:
            self.wrap_qllama_lora(r=config.use_qllama_lora)

    @property
    def image_size(self) -> int:
        """Side of the images the model is meant for."""
        return self.config.force_image_size or self.config.vision_config.image_size

    @property
    def num_patches(self) -> int:
        """Patches of such an image, without the class position."""
        return (self.image_size // self.config.vision_config.patch_size) ** 2

    def get_input_embeddings(self) -> nn.Embedding:
        return self.qllama.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.qllama.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.qllama.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.qllama.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers, on the language model; its configuration here follows."""
        table = self._language_model.resize_token_embeddings(*args, **kwargs)
        self.config.qllama_config.vocab_size = table.num_embeddings
        return table

    def wrap_backbone_lora(self, r: int = 128, lora_alpha: int = ALPHA, lora_dropout: float = DROPOUT) -> None:
        """Adapters in the vision transformer. Raises: ImportError (no peft)."""
        self.vision_model = with_lora(self.vision_model, VISION_TARGETS, r, lora_alpha, lora_dropout)

    def wrap_qllama_lora(self, r: int = 128, lora_alpha: int = ALPHA, lora_dropout: float = DROPOUT) -> None:
        """Adapters in Q-LLaMA's self-attention and MLP. Raises: ImportError (no peft)."""
        self.qllama = with_lora(self.qllama, QLLAMA_TARGETS, r, lora_alpha, lora_dropout)

    @property
    def _language_model(self) -> LlamaForCausalLM:
        lora = hasattr(self.qllama, "get_base_model")
        return self.qllama.get_base_model() if lora else self.qllama

    def resize_pos_embeddings(self, old_size: int, new_size: int, patch_size: int) -> None:
        """As ``InternVisionModel.resize_pos_embeddings``."""
        lora = hasattr(self.vision_model, "get_base_model")
        (self.vision_model.get_base_model() if lora else self.vision_model).resize_pos_embeddings(
            old_size, new_size, patch_size
        )

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple[BaseModelOutputWithPooling, Tensor]:
        """Args:
            pixel_values: [B, C, H, W].
            output_hidden_states, return_dict: of the vision output.
        Returns: the vision transformer's output; query states [B, num_query_token, hidden_size] after the norm.
        Raises: ValueError (no pixel_values, their shape).
        """
        if pixel_values is None:
            raise ValueError("pixel_values is None; the query tokens need images [batch, channels, height, width]")
        vision = self.vision_model(
            pixel_values=pixel_values, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        return vision, self._query_states(vision[0])

    def _query_states(self, vision_hidden_states: Tensor) -> Tensor:
        """[B, num_query_token, hidden_size]: the queries see one another and the image."""
        queries = self.query_tokens.expand(vision_hidden_states.shape[0], -1, -1)
        return self._language_model.model.forward_train(
            inputs_embeds=queries, vision_hidden_states=vision_hidden_states, use_cache=False
        ).last_hidden_state

    def get_image_features(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Last vision state [B, 1 + patches, vision width] and query states [B, num_query_token, hidden_size]."""
        vision, queries = self(pixel_values, output_hidden_states, return_dict)
        return vision[0], queries

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Tensor:
        """Last states [B, S, hidden_size] of the text alone, causal, padding hidden; arguments as Q-LLaMA's."""
        return self._language_model.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        ).last_hidden_state

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        generation_config=None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **generate_kwargs,
    ):
        """Text after [query tokens, ``input_ids``]; ``GenerationMixin.generate`` of the language model.

        Args:
            pixel_values: [B, C, H, W]; None when ``visual_features`` [B, patches, vision width] are given.
            input_ids, attention_mask: [B, S], padding on the left.
            generate_kwargs: of ``GenerationMixin.generate``.
        Returns: the new tokens [B, new]; or its output object.
        Raises: ValueError (neither images nor features; batch sizes).
        """
        if visual_features is None:
            if pixel_values is None:
                raise ValueError("pixel_values and visual_features are None; generate needs one of them")
            visual_features = self.vision_model(
                pixel_values=pixel_values, output_hidden_states=output_hidden_states
            ).last_hidden_state
        batch = visual_features.shape[0]
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        for name, found in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            if found.dim() != 2 or found.shape[0] != batch or found.shape != input_ids.shape:
                raise ValueError(f"{name} has shape {list(found.shape)}; expected [{batch}, tokens], one row per image")
        queries = self.query_tokens.expand(batch, -1, -1)
        text = self.get_input_embeddings()(input_ids)
        ones = attention_mask.new_ones(queries.shape[:2])
        return self._language_model.generate(
            inputs_embeds=torch.cat([queries.to(text.dtype), text], 1),
            attention_mask=torch.cat([ones, attention_mask], 1),
            vision_hidden_states=visual_features,
            use_zero_attention_mask=True,
            generation_config=generation_config,
            **generate_kwargs,
        )
