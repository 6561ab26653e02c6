"""Vision towers: an image encoder whose hidden states become image tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

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
ALLOWED = (
    "a folder with a vision checkpoint, a hub name that starts with 'openai' or 'laion' or contains 'siglip' or "
    "'intern', or mm_vision_config"
)


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


def _clip() -> type[VisionTower]:
    return CLIPVisionTower


def _siglip() -> type[VisionTower]:
    return SiglipVisionTower


def _intern_vit() -> type[VisionTower]:
    from .intern_towers import InternViTTower  # here: only these towers need InternVL's classes

    return InternViTTower


def _internvl() -> type[VisionTower]:
    from .intern_towers import InternVLTower

    return InternVLTower


# model_type of a configuration -> its tower
_BY_MODEL_TYPE = {
    "clip": _clip,
    "clip_vision_model": _clip,
    "siglip": _siglip,
    "siglip_vision_model": _siglip,
    "intern_vit_6b": _intern_vit,
    "internvl": _internvl,
}
# substrings of a name's last component, in LLaVA's order -> tower
_BY_NAME = (
    (("intern_vit_6b", "internvit_6b", "internvit-6b", "internvit6b"), _intern_vit),
    (("internvl_14b", "intern_vl_14b", "internvl-14b", "internvl14b"), _internvl),
    (("siglip",), _siglip),
)


def tower_class(described: Mapping | PretrainedConfig | str) -> type[VisionTower]:
    """The tower for a configuration, or for a checkpoint's folder or hub name.

    A folder's own ``model_type`` decides; only where there is none the name does (LLaVA's substrings).
    Raises: ValueError (not a tower); NotImplementedError (a model this version does not build).
    """
    if isinstance(described, str):
        return _class_of_name(described)
    fields = described.to_dict() if isinstance(described, PretrainedConfig) else described
    return _class_of_type(fields.get("model_type", "clip_vision_model"), "mm_vision_config")


def _class_of_type(model_type: str, where: str) -> type[VisionTower]:
    if model_type not in _BY_MODEL_TYPE:
        raise NotImplementedError(
            f"{where} has model_type {model_type!r}; this version builds {', '.join(map(repr, _BY_MODEL_TYPE))}"
        )
    return _BY_MODEL_TYPE[model_type]()


def _class_of_name(name: str) -> type[VisionTower]:
    exists, lowered = os.path.exists(name), name.lower()
    known = name.startswith(("openai", "laion")) or "intern" in lowered or "siglip" in lowered
    if not exists and not known:
        raise ValueError(f"mm_vision_tower is {name!r}; allowed: {ALLOWED}")
    written = Path(name) / "config.json"
    if written.is_file():
        model_type = json.loads(written.read_text()).get("model_type")
        if model_type:
            return _class_of_type(model_type, str(written))
    kind = os.path.basename(os.path.normpath(lowered))  # the last component: ~/eva/clip must not pick another tower
    for parts, choose in _BY_NAME:
        if any(part in kind for part in parts):
            return choose()
    if "eva" in kind or ("intern" in kind and not exists):
        raise NotImplementedError(f"mm_vision_tower is {name!r}: this version builds CLIP, SigLIP, InternViT-6B and "
                                  f"InternVL-14B towers ({ALLOWED})")  # fmt: skip
    return CLIPVisionTower


def build_vision_tower(vision_tower_cfg, **kwargs) -> VisionTower:
    """The tower named by ``mm_vision_tower`` (or ``vision_tower``), or described by ``mm_vision_config``.

    Args:
        vision_tower_cfg: a model configuration; see ``VisionTower`` for the fields read.
        kwargs: ``delay_load``.
    Returns: a ``VisionTower``. Nothing is fetched when the name is a folder or ``mm_vision_config`` is set.
    Raises: ValueError (not a tower name or folder); NotImplementedError (EVA and other models).
    """
    described = getattr(vision_tower_cfg, "mm_vision_config", None)
    if described is not None:
        return tower_class(described)(None, vision_tower_cfg, **kwargs)
    name = getattr(vision_tower_cfg, "mm_vision_tower", None) or getattr(vision_tower_cfg, "vision_tower", None)
    if not isinstance(name, str):
        raise ValueError(f"mm_vision_tower is {name!r}; allowed: {ALLOWED}")
    return tower_class(name)(name, vision_tower_cfg, **kwargs)
