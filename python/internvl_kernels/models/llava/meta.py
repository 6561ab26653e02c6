"""What every LLaVA adds to a language model: a vision tower, a projector, and the fusing of text and images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from .constants import IMAGE_TOKEN_INDEX
from .fusing import FusePlan, plan_fusing
from .projector import build_vision_projector
from .vision_tower import CLIPVisionTower, build_vision_tower


class LlavaMetaModel:
    """Mixin of the inner model, before the language model in the bases: owns ``vision_tower`` and ``mm_projector``.

    Both exist when the configuration names a tower (``mm_vision_tower``) or describes one (``mm_vision_config``).
    """

    def __init__(self, config):
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None) or getattr(config, "mm_vision_config", None):
            self.vision_tower = build_vision_tower(config, delay_load=True)
            width = self.vision_tower.hidden_size
            if config.mm_hidden_size is None:
                config.mm_hidden_size = width
            elif config.mm_hidden_size != width:
                raise ValueError(f"mm_hidden_size is {config.mm_hidden_size}; the vision tower's width is {width}")
            self.mm_projector = build_vision_projector(config)

    def get_vision_tower(self) -> CLIPVisionTower | None:
        """The tower, also out of the one-element list that keeps it away from FSDP; None without one."""
        tower = getattr(self, "vision_tower", None)
        return tower[0] if isinstance(tower, list) else tower


class Fused(NamedTuple):
    """One multimodal batch: ``inputs_embeds`` [B, L, H], ``real`` [B, L] bool, and the plan for further channels."""

    inputs_embeds: Tensor
    real: Tensor
    plan: FusePlan


class LlavaMetaForCausalLM(ABC):
    """Mixin of the causal-LM class: encodes images and fuses them with the text."""

    @abstractmethod
    def get_model(self) -> LlavaMetaModel:
        """The inner model that owns tower and projector."""

    def get_vision_tower(self) -> CLIPVisionTower | None:
        return self.get_model().get_vision_tower()

    def encode_images(self, images: Tensor) -> Tensor:
        """images [n, C, H, W] -> features [n, P, hidden_size] through tower and projector."""
        model = self.get_model()
        return model.mm_projector(model.get_vision_tower()(images))

    def image_slots(self, images: Tensor | list[Tensor]) -> tuple[Tensor, list[int]]:
        """All feature rows [rows, hidden_size] and the rows of each image slot.

        A 4-D tensor gives one slot for each image. A 5-D tensor [b, n, C, H, W] or a list gives one slot for each
        entry, and an entry of n images joins their features; a list entry may also be one image [C, H, W].
        Raises: ValueError (number of dimensions, or list entries of different sizes).
        """
        if isinstance(images, Tensor) and images.dim() == 4:
            per_slot = [1] * images.shape[0]
        else:
            entries = [entry.unsqueeze(0) if entry.dim() == 3 else entry for entry in images]
            shapes = [list(entry.shape) for entry in entries]
            if any(len(shape) != 4 or shape[1:] != shapes[0][1:] for shape in shapes):
                raise ValueError(
                    f"images: expected [n, C, H, W], [b, n, C, H, W], or a list of [n, C, H, W] or [C, H, W] "
                    f"of one size; found entries {shapes}"
                )
            per_slot = [entry.shape[0] for entry in entries]
            images = torch.cat(entries) if entries else torch.zeros(0, 3, 1, 1)
        if not per_slot:
            weight = self.get_input_embeddings().weight
            return weight.new_zeros(0, weight.shape[1]), []
        features = self.encode_images(images)
        return features.flatten(0, 1), [n * features.shape[1] for n in per_slot]

    def fuse(
        self, input_ids: Tensor, attention_mask: Tensor | None, images, labels: Tensor | None, pack: str | None = None
    ) -> Fused:
        """Embed the text and put image features in the place of every placeholder.

        Args:
            input_ids: [B, S] int64, placeholders are IMAGE_TOKEN_INDEX.
            attention_mask: [B, S], 1 = real, padding on either side; None: all real.
            images: see ``image_slots``.
            labels: only its shape is checked here.
            pack: see ``plan_fusing``.
        Raises: ValueError (shapes, number of images).
        """
        for name, given in (("attention_mask", attention_mask), ("labels", labels)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(f"{name} has shape {list(given.shape)}; input_ids has {list(input_ids.shape)}")
        features, lengths = self.image_slots(images)
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        plan = plan_fusing(input_ids, lengths, real=real, pack=pack)
        is_image = input_ids == IMAGE_TOKEN_INDEX
        text = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if getattr(self.config, "tune_mm_mlp_adapter", False) and getattr(self.config, "mm_use_im_start_end", False):
            # <start> and <end>, the tokens around an image, are learned; all other text embeddings stay fixed
            beside = torch.zeros_like(is_image)
            beside[:, :-1] |= is_image[:, 1:]
            beside[:, 1:] |= is_image[:, :-1]
            text = torch.where(beside[..., None], text, text.detach())
        return Fused(plan.embeddings(text, features), plan.per_token(real, False), plan)

    def prepare_inputs_labels_for_multimodal(self, input_ids, attention_mask, past_key_values, labels, images):
        """-> (input_ids, attention_mask, past_key_values, inputs_embeds, labels), input_ids None when fused.

        Passes through when there is nothing to fuse: no tower, no images, or one text token on top of a cache.
        Otherwise rows of unequal length are padded on the right (embeddings 0, labels IGNORE_INDEX, mask 0);
        padding tokens of the text keep their place, their mask moves with them; the mask keeps its dtype.
        In a decode step with images an attention_mask of any length but past + 1 becomes all ones.
        Raises: ValueError (shapes, number of images).
        """
        if self.get_vision_tower() is None or images is None:
            return input_ids, attention_mask, past_key_values, None, labels
        if input_ids.shape[1] == 1 and (past_key_values is not None or not (input_ids == IMAGE_TOKEN_INDEX).any()):
            if past_key_values is not None and attention_mask is not None:
                total = cache_length(past_key_values) + 1
                if attention_mask.shape[1] != total:
                    attention_mask = attention_mask.new_ones(attention_mask.shape[0], total)
            return input_ids, attention_mask, past_key_values, None, labels
        fused = self.fuse(input_ids, attention_mask, images, labels)
        if attention_mask is not None:
            attention_mask = fused.plan.per_token(attention_mask, 0)
        if labels is not None:
            labels = fused.plan.labels(labels)
        return None, attention_mask, past_key_values, fused.inputs_embeds, labels


def cache_length(past_key_values) -> int:
    """Cached tokens, of a transformers cache or of (key, value) pairs whose values are [.., T, hd]."""
    if hasattr(past_key_values, "get_seq_length"):
        return past_key_values.get_seq_length()
    return past_key_values[-1][1].shape[-2] if len(past_key_values) and len(past_key_values[-1]) else 0
