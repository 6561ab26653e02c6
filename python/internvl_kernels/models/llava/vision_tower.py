"""Vision towers: an image encoder whose hidden states become image tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

_FEATURES = ("patch", "cls_patch")


class VisionTower(nn.Module):
    """An image encoder; subclasses say which.

    Args:
        vision_tower: folder or hub name of a checkpoint; None when ``args.mm_vision_config`` describes it.
        args: anything with ``mm_vision_select_layer`` (index into embeddings + layers, default -2),
            ``mm_vision_select_feature`` ('patch' drops the class token, 'cls_patch' keeps it),
            ``mm_tune_vision_tower`` (default False: frozen, no gradient) and perhaps ``mm_vision_config``
            (the encoder's configuration as dict: the module exists at once, its weights come with the checkpoint).
        delay_load: with a path, read only the configuration until ``load_model()``.
    Raises: ValueError (select feature).
    """

    config_class: type[PretrainedConfig]
    model_class: type[PreTrainedModel]
    class_tokens = 1  # positions before the patches

    def __init__(self, vision_tower: str | None, args, delay_load: bool = False):
        super().__init__()
        self.vision_tower_name = vision_tower
        self.select_layer = getattr(args, "mm_vision_select_layer", -2)
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        self.trainable = bool(getattr(args, "mm_tune_vision_tower", False))
        _check_feature(self.select_feature)
        self.is_loaded = False
        described = getattr(args, "mm_vision_config", None)
        if described is not None:
            self.cfg_only = self._config_of(described)
            self._adopt(self.model_class(self.cfg_only))
        else:
            self.cfg_only = self.config_class.from_pretrained(vision_tower)
            if not delay_load:
                self.load_model()

    @classmethod
    def _config_of(cls, described: PretrainedConfig | Mapping) -> PretrainedConfig:
        return described if isinstance(described, PretrainedConfig) else cls.config_class.from_dict(dict(described))

    def load_model(self) -> None:
        """Read the checkpoint at ``vision_tower_name``; does nothing when the weights are already there."""
        if not self.is_loaded:
            self._adopt(self.model_class.from_pretrained(self.vision_tower_name))

    def _adopt(self, model: PreTrainedModel) -> None:
        self.vision_tower = model.requires_grad_(self.trainable)
        self.is_loaded = True

    @property
    def image_processor(self):
        """The checkpoint's image processor; a tower without a path gets CLIP's defaults at its own image size."""
        from transformers import AutoImageProcessor, CLIPImageProcessor  # here: they need an image library

        if self.vision_tower_name is not None:
            return AutoImageProcessor.from_pretrained(self.vision_tower_name)
        size = self.image_size
        return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    def _select(self, hidden_states: tuple[Tensor, ...]) -> Tensor:
        _check_feature(self.select_feature)
        # transformers 5 records a layer twice once the language model around the tower was asked for its own states
        states = [h for i, h in enumerate(hidden_states) if i == 0 or h is not hidden_states[i - 1]]
        if not -len(states) <= self.select_layer < len(states):
            raise ValueError(
                f"mm_vision_select_layer is {self.select_layer}; the tower has {len(states)} states, "
                f"its embeddings and {len(states) - 1} layers"
            )
        features = states[self.select_layer]
        return features[:, self.class_tokens :] if self.select_feature == "patch" else features

    def _encode(self, images: Tensor) -> Tensor:
        pixels = images.to(device=self.device, dtype=self.dtype)
        return self._select(self.vision_tower(pixels, output_hidden_states=True).hidden_states).to(images.dtype)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """images [n, C, H, W] -> features [n, P, M] in the images' dtype; a list of [C, H, W] -> a list of [1, P, M].

        Raises: RuntimeError when the weights were not loaded yet; ValueError (shape).
        """
        if not self.is_loaded:
            raise RuntimeError(f"the vision tower {self.vision_tower_name!r} has no weights yet; call load_model()")
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            if isinstance(images, list):
                return [self._encode(self._checked(image.unsqueeze(0))) for image in images]
            return self._encode(self._checked(images))

    def _checked(self, images: Tensor) -> Tensor:
        expected = [self.image_config.num_channels, self.image_size, self.image_size]
        if images.dim() != 4 or list(images.shape[1:]) != expected:
            raise ValueError(f"images have shape {list(images.shape)}; the vision tower takes [n, {str(expected)[1:]}")
        return images

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def config(self) -> PretrainedConfig:
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def image_config(self) -> PretrainedConfig:
        """The configuration that holds ``image_size``, ``patch_size`` and ``num_channels``."""
        return self.config

    @property
    def image_size(self) -> int:
        return self.image_config.image_size

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.image_config.patch_size) ** 2

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)


class CLIPVisionTower(VisionTower):
    """CLIP's vision encoder, from transformers."""

    config_class, model_class = CLIPVisionConfig, CLIPVisionModel


class SiglipVisionTower(VisionTower):
    """SigLIP's vision encoder, from transformers; it has no class token, so 'patch' and 'cls_patch' agree."""

    config_class, model_class = SiglipVisionConfig, SiglipVisionModel
    class_tokens = 0


def _check_feature(feature: str) -> None:
    if feature not in _FEATURES:
        raise ValueError(f"mm_vision_select_feature is {feature!r}; allowed: 'patch', 'cls_patch'")
