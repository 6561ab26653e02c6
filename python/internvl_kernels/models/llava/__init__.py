"""LLaVA: vision towers, projectors, the fusing of text and images, and a prefix-LM LLaVA over MPT."""

from .constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from .meta import LlavaMetaForCausalLM, LlavaMetaModel
from .mpt_prefix import LlavaMptPrefixConfig, LlavaMptPrefixForCausalLM, LlavaMptPrefixModel
from .projector import build_vision_projector
from .vision_tower import CLIPVisionTower, build_vision_tower

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN_INDEX",
    "CLIPVisionTower",
    "LlavaMetaForCausalLM",
    "LlavaMetaModel",
    "LlavaMptPrefixConfig",
    "LlavaMptPrefixForCausalLM",
    "LlavaMptPrefixModel",
    "build_vision_projector",
    "build_vision_tower",
]
