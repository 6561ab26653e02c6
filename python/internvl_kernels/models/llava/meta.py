"""What every LLaVA adds to a language model: a vision tower, a projector, and the fusing of text and images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import cache_length
from .constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from .fusing import FusePlan, plan_fusing
from .projector import build_vision_projector, project, project_nothing
from .setup import VisionSetup, VisionTokenizerSetup
from .tower_builder import build_vision_tower
from .vision_tower import VisionTower


class LlavaMetaModel(VisionSetup):
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

    def get_vision_tower(self) -> VisionTower | None:
        """The tower, also out of the one-element list that keeps it away from FSDP; None without one."""
        tower = getattr(self, "vision_tower", None)
        return tower[0] if isinstance(tower, list) else tower


class Fused(NamedTuple):
    """One multimodal batch: ``inputs_embeds`` [B, L, H], ``real`` [B, L] bool, and the plan for further channels."""

    inputs_embeds: Tensor
    real: Tensor
    plan: FusePlan


class LlavaMetaForCausalLM(VisionTokenizerSetup, ABC):
    """Mixin of the causal-LM class: encodes images and fuses them with the text."""

    @abstractmethod
    def get_model(self) -> LlavaMetaModel:
        """The inner model that owns tower and projector."""

    def get_vision_tower(self) -> VisionTower | None:
        return self.get_model().get_vision_tower()

    def encode_images(self, images: Tensor) -> Tensor:
        """images [n, C, H, W] -> features [n, P, hidden_size] through tower and projector."""
        model = self.get_model()
        return project(model.mm_projector, model.get_vision_tower()(images))

    def image_slots(self, images: Tensor | list[Tensor]) -> tuple[Tensor, list[int]]:
        """All feature rows [rows, hidden_size] and the rows of each image slot.

        A 4-D tensor gives one slot for each image. A 5-D tensor [b, n, C, H, W] or a list gives one slot for each
        entry, and an entry of n images joins their features; a list entry may also be one image [C, H, W].
        Raises: ValueError (number of dimensions, list entries of different sizes, width of the features).
        """
        entries = [images] if isinstance(images, Tensor) else images
        if not isinstance(entries, list | tuple) or not all(isinstance(entry, Tensor) for entry in entries):
            found = type(images).__name__
            if isinstance(images, list | tuple):
                found += f" of {', '.join(sorted({type(entry).__name__ for entry in images}))}"
            raise ValueError(
                f"images is a {found}; expected a tensor or a list of tensors (image_processor makes them)"
            )
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
        width = self.get_input_embeddings().weight.shape[1]
        if not per_slot:
            return self.get_input_embeddings().weight.new_zeros(0, width), []
        features = self.encode_images(images)
        if features.shape[-1] != width:
            raise ValueError(f"the projector gives features of width {features.shape[-1]}; text has width {width}")
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
        Raises: ValueError (shapes, token ids, number of images).
        """
        for name, given in (("attention_mask", attention_mask), ("labels", labels)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(f"{name} has shape {list(given.shape)}; input_ids has {list(input_ids.shape)}")
        is_image = input_ids == IMAGE_TOKEN_INDEX
        table = self.get_input_embeddings()
        check_tokens(input_ids, table.weight.shape[0])
        features, lengths = self.image_slots(images)
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        plan = plan_fusing(input_ids, lengths, real=real, pack=pack)
        text = table(input_ids.masked_fill(is_image, 0))
        if self._tunes_only_start_and_end():
            # <start> and <end>, the tokens around an image, are learned; all other text embeddings stay fixed
            beside = torch.zeros_like(is_image)
            beside[:, :-1] |= is_image[:, 1:]
            beside[:, 1:] |= is_image[:, :-1]
            text = torch.where(beside[..., None], text, text.detach())
        return Fused(plan.embeddings(text, features), plan.per_token(real, False), plan)

    def fused_labels(self, plan: FusePlan, labels: Tensor, input_ids: Tensor) -> Tensor:
        """labels [B, S] -> [B, L]; features and padding are ignored, each text token keeps its own label.

        With ``mm_end_label_of_image`` (and both start/end flags) <end> takes its placeholder's, as in the original.
        """
        shifted = self._tunes_only_start_and_end() and getattr(self.config, "mm_end_label_of_image", False)
        return plan.labels(labels, input_ids if shifted else None)

    def _tunes_only_start_and_end(self) -> bool:
        flags = ("tune_mm_mlp_adapter", "mm_use_im_start_end")
        return all(getattr(self.config, name, False) for name in flags)

    def prepare_inputs_labels_for_multimodal(self, input_ids, attention_mask, past_key_values, labels, images):
        """-> (input_ids, attention_mask, past_key_values, inputs_embeds, labels), input_ids None when fused.

        Passes through when there is nothing to fuse: no tower, no images, or one text token on top of a cache.
        Otherwise rows of unequal length are padded on the right (embeddings 0, labels IGNORE_INDEX, mask 0);
        padding tokens of the text keep their place, their mask moves with them; the mask keeps its dtype.
        In a decode step with images an attention_mask of any length but past + 1 becomes all ones.
        Raises: ValueError (shapes, token ids, number of images).
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
            labels = self.fused_labels(fused.plan, labels, input_ids)
        return None, attention_mask, past_key_values, fused.inputs_embeds, labels

    def keep_vision_in_graph(self, inputs_embeds: Tensor) -> Tensor:
        """The same values; projector (and a tuned tower) get zero gradients from a batch without images."""
        model, tower = self.get_model(), self.get_vision_tower()
        if tower is None or not tower.is_loaded or not torch.is_grad_enabled():
            return inputs_embeds
        if tower.trainable:  # encoders do not take empty batches
            config, size = tower.image_config, tower.image_size
            blank = inputs_embeds.new_zeros(1, config.num_channels, size, size)
            unused = self.encode_images(blank)[:0]
        elif any(p.requires_grad for p in model.mm_projector.parameters()):
            unused = project_nothing(model.mm_projector, tower.hidden_size)
        else:
            return inputs_embeds
        return inputs_embeds + unused.sum().to(inputs_embeds.dtype)


def check_tokens(input_ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError for an id that is neither a token nor a placeholder; device memory is never read."""
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((input_ids < 0) | (input_ids >= vocab_size)) & (input_ids != IMAGE_TOKEN_INDEX)
    if wrong.any():
        sample, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids[{sample}, {token}] is {int(input_ids[sample, token])}; allowed: 0 to {vocab_size - 1}, and "
            f"{IMAGE_TOKEN_INDEX} for an image"
        )


def check_no_placeholder(input_ids: Tensor | None, reason: str) -> None:
    """Raises ValueError when placeholders stand in ``input_ids`` and nothing will take their place."""
    if input_ids is None or torch.compiler.is_compiling() or input_ids.device.type != "cpu":
        return
    found = (input_ids == IMAGE_TOKEN_INDEX).nonzero()
    if len(found):
        sample, token = found[0].tolist()
        raise ValueError(f"input_ids[{sample}, {token}] is an image placeholder ({IMAGE_TOKEN_INDEX}); {reason}")


def default_prefix(mode: str, real: Tensor, is_image: Tensor | None, labels: Tensor | None) -> Tensor:
    """[B, L] bool, keys that every query may see: ``mode`` is a value of ``mm_prefix``."""
    if mode == "images":
        return torch.zeros_like(real) if is_image is None else is_image & real
    return real if labels is None else real & ((labels != IGNORE_INDEX).cumsum(1) == 0)
