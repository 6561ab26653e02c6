"""The Q-LLaMA language model."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin
from transformers import LlamaForCausalLM as TheirLlama
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..inputs import check_labels
from .configuration_qllama import QLlamaConfig
from .generation import QLlamaGenerationMixin
from .model import LlamaModel, LlamaPreTrainedModel


class LlamaForCausalLM(QLlamaGenerationMixin, LlamaPreTrainedModel, GenerationMixin):
    """``LlamaModel`` under ``model`` with an output head ``lm_head``, its own unless ``tie_word_embeddings``."""

    _tied_weights_keys = TheirLlama._tied_weights_keys  # a list or a dict, by the release of transformers

    def __init__(self, config: QLlamaConfig):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> LlamaModel:
        return self.model

    def set_decoder(self, decoder: LlamaModel) -> None:
        self.model = decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        vision_hidden_states: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        use_zero_attention_mask: bool | None = None,
        return_dict: bool | None = None,
        repeat_time: int = 1,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Args:
            labels: [B, S] int64, -100 = ignored; shifted here, not changed.
            logits_to_keep: score only the last so many positions; 0 = all.
            Others: as ``LlamaModel.forward``.
        Returns: logits [B, S, V]; loss (mean next-token cross entropy) with labels; the rest as ``LlamaModel``.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None:
            check_labels(labels, self.lm_head.weight.shape[0], tuple(given.shape[:2]))
        if labels is not None and logits_to_keep:
            raise ValueError(
                f"labels were given with logits_to_keep={logits_to_keep}; they need every position: pass 0"
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_hidden_states=vision_hidden_states,
            repeat_time=repeat_time,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            use_zero_attention_mask=use_zero_attention_mask,
        )
        hidden = outputs.last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if return_dict is False else result
