"""The towers over InternVL's own vision models."""

from __future__ import annotations

import torch
from torch import Tensor

from ..internvl_14b import InternVisionConfig, InternVisionModel, InternVLConfig, InternVLModel
from .vision_tower import VisionTower

_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet


def _processor(size: int):
    from transformers import CLIPImageProcessor  # here: it needs an image library

    crop = {"height": size, "width": size}
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop, image_mean=_MEAN, image_std=_STD)


class InternViTTower(VisionTower):
    """InternViT; images of any size that is a multiple of the patch size."""

    config_class, model_class = InternVisionConfig, InternVisionModel

    def _checked(self, images: Tensor) -> Tensor:
        channels, patch = self.image_config.num_channels, self.image_config.patch_size
        if images.dim() != 4 or images.shape[1] != channels or images.shape[2] % patch or images.shape[3] % patch:
            raise ValueError(
                f"images have shape {list(images.shape)}; the vision tower takes [n, {channels}, H, W] with H and W "
                f"multiples of {patch}"
            )
        return images

    @property
    def image_processor(self):
        return _processor(448 if "448" in (self.vision_tower_name or "") else 336)


class InternVLTower(InternViTTower):
    """InternVL-14B: InternViT, then Q-LLaMA's query states that have read the image."""

    config_class, model_class = InternVLConfig, InternVLModel

    def _encode(self, images: Tensor) -> list[Tensor]:
        """[patch features [n, P, vision width], query states [n, queries, Q-LLaMA width]]."""
        pixels = images.to(device=self.device, dtype=self.dtype)
        vision, queries = self.vision_tower(pixels, output_hidden_states=True, return_dict=True)[:2]
        return [self._select(vision.hidden_states).to(images.dtype), queries]

    @property
    def image_config(self):
        return self.config.vision_config

    @property
    def hidden_size(self) -> int:
        return self.config.qllama_config.hidden_size

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.image_config.patch_size) ** 2 + self.config.num_query_token

    @property
    def image_processor(self):
        return _processor(336)

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)
