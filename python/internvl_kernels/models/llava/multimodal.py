"""``forward`` and ``generate`` with images, and checkpoints with a tower: what the LLaVA classes share."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import CheckedLoading
from ..inputs import check_id_shape, check_labels, check_room
from .cache import cache_length
from .constants import IMAGE_TOKEN_INDEX
from .meta import LlavaMetaForCausalLM, check_no_placeholder, check_tokens, default_prefix

_CAUSAL = "prefix_mask was given; this model is causal (config.mm_prefix is None)"
_TOWER, _OLD_LEVEL = "vision_tower.vision_tower.", "vision_model."


@dataclass
class StepInputs:
    """What one forward pass of the language model gets. Masks are [B, keys], cached keys included."""

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    prefix_mask: Tensor | None
    labels: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        given = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        return tuple(given.shape[:2])


class LlavaMultimodal(CheckedLoading, LlavaMetaForCausalLM):
    """Mixin of both causal-LM classes, before the language model in the bases."""

    pad_side_in_training: str | None = None  # where a language model wants padding while it trains; None: anywhere

    def step_inputs(self, input_ids, attention_mask, past_key_values, inputs_embeds, labels, images, prefix_mask):
        """Fuse what is to be fused, check the shapes, and find the prefix.

        On top of a cache images are read only for placeholders among the new tokens.
        Raises: ValueError (shapes, token ids, number of images, an image placeholder without images).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        vocab_size = self.get_input_embeddings().weight.shape[0]
        if input_ids is not None:
            check_id_shape(input_ids)
        check_labels(labels, vocab_size, placeholder=IMAGE_TOKEN_INDEX)
        past, is_image = cache_length(past_key_values), None
        step = StepInputs(input_ids, inputs_embeds, attention_mask, prefix_mask, labels)
        if input_ids is None:
            self._check_width(inputs_embeds)
        elif images is None or self.get_vision_tower() is None:
            check_no_placeholder(input_ids, "images is None" if images is None else "the model has no vision tower")
            check_tokens(input_ids, vocab_size)
            if self.training and images is None:
                step.inputs_embeds = self.keep_vision_in_graph(self.get_input_embeddings()(input_ids))
                step.input_ids = None
        elif past == 0 or (input_ids.shape[1] > 1 and bool((input_ids == IMAGE_TOKEN_INDEX).any())):
            is_image = self._fuse_step(step, images, past)
        elif attention_mask is not None and attention_mask.shape[1] != past + input_ids.shape[1]:
            total = past + input_ids.shape[1]  # a mask over unfused tokens; the original decodes with all ones
            step.attention_mask = attention_mask.new_ones(attention_mask.shape[0], total)
        self._check_masks(step, past)
        check_room(past_key_values, step.shape[1])
        mode = self.config.mm_prefix
        if mode is None and prefix_mask is not None:
            raise ValueError(_CAUSAL)
        if mode is not None and prefix_mask is None:
            step.prefix_mask = self._prefix(mode, step, past, is_image)
        return step

    def _fuse_step(self, step: StepInputs, images, past: int) -> Tensor:
        """Fill ``step`` from the fused batch; returns the image positions [B, past + L]."""
        ids, mask = step.input_ids, step.attention_mask
        before = None if mask is None or past == 0 else mask[:, : mask.shape[1] - ids.shape[1]]
        if before is not None and before.shape[1] != past:
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)}; expected {[ids.shape[0], past + ids.shape[1]]}, "
                "cached keys included"
            )
        new = mask if mask is None or past == 0 else mask[:, past:]
        pack = None
        if self.training and self.pad_side_in_training and new is not None and not bool((new[:, 0] != 0).all()):
            pack = self.pad_side_in_training
        fused = self.fuse(ids, new, images, step.labels, pack)
        step.input_ids, step.inputs_embeds = None, fused.inputs_embeds
        real = fused.real
        if past:
            cached = real.new_ones(real.shape[0], past) if before is None else before != 0
            real = torch.cat([cached, real], 1)
        step.attention_mask = real
        if step.labels is not None:
            step.labels = self.fused_labels(fused.plan, step.labels, ids)
        if step.prefix_mask is not None and past == 0:
            step.prefix_mask = fused.plan.per_token(step.prefix_mask, 0)
        return torch.nn.functional.pad(fused.plan.is_image, (past, 0))

    def _check_width(self, inputs_embeds: Tensor) -> None:
        width = self.get_input_embeddings().weight.shape[1]
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != width:
            raise ValueError(f"inputs_embeds has shape {list(inputs_embeds.shape)}; expected [batch, tokens, {width}]")

    def _check_masks(self, step: StepInputs, past: int) -> None:
        batch, seqlen = step.shape
        for name, given, keys in (
            ("attention_mask", step.attention_mask, past + seqlen),
            ("prefix_mask", step.prefix_mask, past + seqlen),
            ("labels", step.labels, seqlen),
        ):
            if given is not None and given.dim() != 4 and tuple(given.shape) != (batch, keys):
                raise ValueError(f"{name} has shape {list(given.shape)}; expected {[batch, keys]}"
                                 + (", cached keys included" if past and keys > seqlen else ""))  # fmt: skip

    def _prefix(self, mode: str, step: StepInputs, past: int, is_image: Tensor | None) -> Tensor:
        """[B, T] bool. On top of a cache nothing but new images: every earlier key is visible anyway."""
        batch, seqlen = step.shape
        device = (step.input_ids if step.inputs_embeds is None else step.inputs_embeds).device
        if step.attention_mask is None:
            real = torch.ones(batch, past + seqlen, dtype=torch.bool, device=device)
        else:
            real = step.attention_mask != 0
        if past and is_image is None:
            return torch.zeros_like(real)
        labels = step.labels
        if past:
            mode = "images"
        return default_prefix(mode, real, is_image, labels)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ):
        """``GenerationMixin.generate`` with images: greedy, beams or sampling, over a cache.

        Rows may hold different numbers of images and padding on either side. With ``mm_prefix`` the prompt (or its
        images) is visible to every token of the prompt; ``prefix_mask`` [B, S] names other prompt tokens.
        Args:
            inputs (or input_ids): [B, S] int64 with IMAGE_TOKEN_INDEX placeholders.
            images, attention_mask: as in ``forward``.
        Returns: as without images: sequences [B * num_return_sequences, S + new] that begin with the prompt. With
            images ``max_length`` and ``min_length`` count the tokens of ``inputs``, an image as one.
        Raises: ValueError (shapes, token ids, number of images).
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if self.config.mm_prefix is None and kwargs.get("prefix_mask") is not None:
            raise ValueError(_CAUSAL)
        if input_ids is None or images is None or self.get_vision_tower() is None:
            reason = "images is None" if images is None else "the model has no vision tower"
            check_no_placeholder(input_ids, reason)
            if self.config.mm_prefix == "prompt" and kwargs.get("prefix_mask") is None:
                kwargs["prefix_mask"] = self._whole_prompt(input_ids, attention_mask, kwargs)
            return super().generate(inputs=input_ids, attention_mask=attention_mask, **kwargs)
        fused = self.fuse(input_ids, attention_mask, images, None, pack="left")
        mode, given = self.config.mm_prefix, kwargs.pop("prefix_mask", None)
        if mode is not None:
            chosen = default_prefix(mode, fused.real, fused.plan.is_image, None)
            kwargs["prefix_mask"] = chosen if given is None else fused.plan.per_token(given, 0)
        self._lengths_of_new_tokens(kwargs, input_ids.shape[1])
        # Padding repeats a token: transformers 4 takes a static cache's zero keys, which zeros give, for free slots.
        first = fused.inputs_embeds[torch.arange(len(input_ids)), fused.real.int().argmax(1)]
        embeds = torch.where(fused.real[..., None], fused.inputs_embeds, first[:, None])
        out = super().generate(inputs_embeds=embeds, attention_mask=fused.real.long(), **kwargs)
        new = out if isinstance(out, Tensor) else out.sequences
        prompt = input_ids.repeat_interleave(new.shape[0] // max(input_ids.shape[0], 1), dim=0)
        sequences = torch.cat([prompt, new], dim=1)
        if isinstance(out, Tensor):
            return sequences
        out.sequences = sequences
        return out

    @staticmethod
    def _whole_prompt(input_ids: Tensor | None, attention_mask: Tensor | None, kwargs: dict) -> Tensor | None:
        if attention_mask is not None:
            return attention_mask != 0
        prompt = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        return None if prompt is None else torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)

    @staticmethod
    def _lengths_of_new_tokens(kwargs: dict, prompt: int) -> None:
        """Total lengths, which the caller counts in tokens of the prompt, as lengths of what is generated."""
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            length = kwargs.pop(total, None)
            if length is not None and kwargs.get(new) is None:
                kwargs[new] = max(length - prompt, 0)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers. A tower in the checkpoint is loaded; one that is not tuned comes back frozen.

        Raises: ValueError (unreadable file; missing, unexpected or misshapen keys).
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        tower = model.get_vision_tower()
        if tower is not None and tower.is_loaded:
            tower.requires_grad_(tower.trainable)
        return (model, info) if output_loading_info else model

    @classmethod
    def _load(cls, name, *args, **kwargs):
        model, info = super()._load(name, *args, **kwargs)
        tower, wanted = model.get_vision_tower(), {}
        found = [key for key in info["unexpected_keys"] if _TOWER in key]
        if found and tower is not None and not tower.is_loaded:
            # the checkpoint brings a tower that so far only a path described: make room for it
            model.config.mm_vision_config = tower.config.to_dict()
            wanted["config"] = model.config
        elif found and any(_TOWER + _OLD_LEVEL in key for key in info["missing_keys"]):
            # written by transformers 5, read by 4: there CLIP and SigLIP have one more level
            wanted["key_mapping"] = {rf"({re.escape(_TOWER)})(?!{re.escape(_OLD_LEVEL)})": rf"\1{_OLD_LEVEL}"}
        return super()._load(name, *args, **{**kwargs, **wanted}) if wanted else (model, info)

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; the tower's configuration goes along, so that loading needs no second checkpoint."""
        tower = self.get_vision_tower()
        if tower is not None and tower.is_loaded:
            self.config.mm_vision_config = tower.config.to_dict()
        return super().save_pretrained(*args, **kwargs)
