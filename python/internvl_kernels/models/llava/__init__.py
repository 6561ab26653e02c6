"""LLaVA over LLaMA and over MPT: vision towers, projectors, the fusing of text and images, optional prefix masks."""

from .configuration import LlavaConfig, LlavaMptConfig, LlavaMptPrefixConfig
from .constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from .llava_llama import LlavaLlamaForCausalLM, LlavaLlamaModel
from .llava_mpt import LlavaMptForCausalLM, LlavaMptModel, LlavaMptPrefixForCausalLM, LlavaMptPrefixModel
from .meta import LlavaMetaForCausalLM, LlavaMetaModel
from .projector import build_vision_projector
from .prompt import tokenizer_image_token
from .tower_builder import build_vision_tower
from .vision_tower import CLIPVisionTower, SiglipVisionTower, VisionTower

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN_INDEX",
    "CLIPVisionTower",
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaLlamaModel",
    "LlavaMetaForCausalLM",
    "LlavaMetaModel",
    "LlavaMptConfig",
    "LlavaMptForCausalLM",
    "LlavaMptModel",
    "LlavaMptPrefixConfig",
    "LlavaMptPrefixForCausalLM",
    "LlavaMptPrefixModel",
    "SiglipVisionTower",
    "VisionTower",
    "build_vision_projector",
    "build_vision_tower",
    "tokenizer_image_token",
]
