"""Which vision tower a configuration, a folder or a hub name stands for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from transformers import PretrainedConfig

from .intern_towers import InternViTTower, InternVLTower
from .vision_tower import CLIPVisionTower, SiglipVisionTower, VisionTower

ALLOWED = (
    "a folder with a vision checkpoint, a hub name that starts with 'openai' or 'laion' or contains 'siglip' or "
    "'intern', or mm_vision_config"
)

# model_type of a configuration -> its tower
_BY_MODEL_TYPE = {
    "clip": CLIPVisionTower,
    "clip_vision_model": CLIPVisionTower,
    "siglip": SiglipVisionTower,
    "siglip_vision_model": SiglipVisionTower,
    "intern_vit_6b": InternViTTower,
    "internvl": InternVLTower,
}
# substrings of a name's last component, in LLaVA's order -> tower
_BY_NAME = (
    (("intern_vit_6b", "internvit_6b", "internvit-6b", "internvit6b"), InternViTTower),
    (("internvl_14b", "intern_vl_14b", "internvl-14b", "internvl14b"), InternVLTower),
    (("siglip",), SiglipVisionTower),
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
    return _BY_MODEL_TYPE[model_type]


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
    for parts, tower in _BY_NAME:
        if any(part in kind for part in parts):
            return tower
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
