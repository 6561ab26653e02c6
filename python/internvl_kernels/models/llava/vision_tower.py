"""Vision towers: CLIP from transformers, built from a folder, a hub name or a plain configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

_FEATURES = ("patch", "cls_patch")
# substrings by which LLaVA chooses towers that this version does not build
_OTHER_TOWERS = ("eva", "intern_vit_6b", "internvit_6b", "internvit6b", "internvl_14b", "intern_vl_14b", "internvl14b")
_OTHER_TOWERS += ("internvit-6b", "internvl-14b")
ALLOWED = "a folder with a CLIP vision checkpoint, a hub name starting with 'openai' or 'laion', or mm_vision_config"


class CLIPVisionTower(nn.Module):
    """A CLIP vision encoder whose hidden states become image tokens.

    Args:
        vision_tower: folder or hub name of a CLIP checkpoint; None when ``args.mm_vision_config`` describes it.
        args: anything with ``mm_vision_select_layer`` (index into embeddings + layers, default -2),
            ``mm_vision_select_feature`` ('patch' drops position 0, 'cls_patch' keeps it),
            ``mm_tune_vision_tower`` (default False: frozen, no gradient) and perhaps ``mm_vision_config``
            (a CLIPVisionConfig as dict: the module exists at once, its weights come with the checkpoint).
        delay_load: with a path, read only the configuration until ``load_model()``.
    Raises: ValueError (select feature).
    """

    def __init__(self, vision_tower: str | None, args, delay_load: bool = False):
        super().__init__()
        self.vision_tower_name = vision_tower
        self.select_layer = getattr(args, "mm_vision_select_layer", -2)
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        self.trainable = bool(getattr(args, "mm_tune_vision_tower", False))
        if self.select_feature not in _FEATURES:
            raise ValueError(f"mm_vision_select_feature is {self.select_feature!r}; allowed: 'patch', 'cls_patch'")
        self.is_loaded = False
        described = getattr(args, "mm_vision_config", None)
        if described is not None:
            self.cfg_only = _vision_config(described)
            self._adopt(CLIPVisionModel(self.cfg_only))
        else:
            self.cfg_only = CLIPVisionConfig.from_pretrained(vision_tower)
            if not delay_load:
                self.load_model()

    def load_model(self) -> None:
        """Read the checkpoint at ``vision_tower_name``; does nothing when the weights are already there."""
        if not self.is_loaded:
            self._adopt(CLIPVisionModel.from_pretrained(self.vision_tower_name))

    def _adopt(self, model: CLIPVisionModel) -> None:
        self.vision_tower = model.requires_grad_(self.trainable)
        self.is_loaded = True

    @property
    def image_processor(self):
        """The checkpoint's CLIPImageProcessor; a tower without a path gets CLIP's defaults at its own image size."""
        from transformers import CLIPImageProcessor  # here: it needs an image library, the tower does not

        if self.vision_tower_name is not None:
            return CLIPImageProcessor.from_pretrained(self.vision_tower_name)
        size = self.config.image_size
        return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    def _select(self, hidden_states: tuple[Tensor, ...]) -> Tensor:
        features = hidden_states[self.select_layer]
        return features[:, 1:] if self.select_feature == "patch" else features

    def _encode(self, images: Tensor) -> Tensor:
        pixels = images.to(device=self.device, dtype=self.dtype)
        return self._select(self.vision_tower(pixels, output_hidden_states=True).hidden_states).to(images.dtype)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """images [n, C, H, W] -> features [n, P, M] in the images' dtype; a list of [C, H, W] -> a list of [1, P, M].

        Raises: RuntimeError when the weights were not loaded yet.
        """
        if not self.is_loaded:
            raise RuntimeError(f"the vision tower {self.vision_tower_name!r} has no weights yet; call load_model()")
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            if isinstance(images, list):
                return [self._encode(image.unsqueeze(0)) for image in images]
            return self._encode(images)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def config(self) -> CLIPVisionConfig:
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches(self) -> int:
        return (self.config.image_size // self.config.patch_size) ** 2

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)


def _vision_config(described: CLIPVisionConfig | Mapping) -> CLIPVisionConfig:
    if isinstance(described, CLIPVisionConfig):
        return described
    kind = described.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise NotImplementedError(f"mm_vision_config has model_type {kind!r}; this version builds 'clip_vision_model'")
    return CLIPVisionConfig.from_dict(dict(described))


def build_vision_tower(vision_tower_cfg, **kwargs) -> CLIPVisionTower:
    """The tower named by ``mm_vision_tower`` (or ``vision_tower``), or described by ``mm_vision_config``.

    Args:
        vision_tower_cfg: a model configuration; see ``CLIPVisionTower`` for the fields read.
        kwargs: ``delay_load``.
    Returns: a ``CLIPVisionTower``. Nothing is fetched when the name is a folder or ``mm_vision_config`` is set.
    Raises: ValueError (not a tower name or folder); NotImplementedError (InternViT, InternVL-14B, EVA).
    """
    if getattr(vision_tower_cfg, "mm_vision_config", None) is not None:
        return CLIPVisionTower(None, vision_tower_cfg, **kwargs)
    name = getattr(vision_tower_cfg, "mm_vision_tower", None) or getattr(vision_tower_cfg, "vision_tower", None)
    if not isinstance(name, str) or not (
        os.path.exists(name) or name.startswith(("openai", "laion")) or "intern" in name.lower()
    ):
        raise ValueError(f"mm_vision_tower is {name!r}; allowed: {ALLOWED}")
    # the last path component only: a folder such as ~/eva/clip must not pick another tower
    kind = os.path.basename(os.path.normpath(name)).lower()
    if any(part in kind for part in _OTHER_TOWERS) or ("intern" in kind and not os.path.exists(name)):
        raise NotImplementedError(f"mm_vision_tower is {name!r}: this version builds CLIP towers only ({ALLOWED})")
    return CLIPVisionTower(name, vision_tower_cfg, **kwargs)
