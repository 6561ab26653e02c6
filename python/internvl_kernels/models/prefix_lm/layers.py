"""The attention layers of a model, made to understand key carriers, and back; parameters and buffers stay."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .attention import LayerConfig, is_interface_layer
from .carriers import PrefixLMError
from .families import PREFIX_CLASSES, family_of

LAYER_TYPES = ("full_attention", "sliding_attention")


def check_layers(model: PreTrainedModel) -> None:
    """Raises TypeError or ValueError when some attention layer of the model cannot see a prefix."""
    name = type(model).__name__
    other = sorted(set(getattr(model.config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if other:
        raise PrefixLMError(f"{name} has layers of type {', '.join(other)}; a prefix needs {' or '.join(LAYER_TYPES)}")
    own = family_of(type(model)).classes
    found = {c for m in model.modules() for c in own if type(m) is c}
    if len(found) < len(own):
        missing = ", ".join(sorted(c.__name__ for c in set(own) - found))
        raise PrefixLMError(f"{name} holds no {missing}; load it with attn_implementation='eager'")
    layers = [m for m in model.modules() if is_interface_layer(m)]
    if not own and not layers:
        raise TypeError(
            f"the attention of {name} does not go through the attention interface of transformers; supported are the "
            "models that use it, GPT-Neo, GPT-J and BLOOM"
        )
    for layer in layers:
        if not getattr(layer, "is_causal", True):
            raise PrefixLMError(f"{name} holds attention that is not causal ({type(layer).__name__})")


def install(model: PreTrainedModel) -> None:
    """In place. Layers of one configuration share one view of it."""
    own = family_of(type(model)).classes
    views: dict[int, LayerConfig] = {}
    for module in model.modules():
        if type(module) in own:
            module.__class__ = own[type(module)]
        elif is_interface_layer(module) and not isinstance(module.config, LayerConfig):
            module.config = views.setdefault(id(module.config), LayerConfig(module.config))


def uninstall(model: nn.Module) -> None:
    """The reverse of ``install``."""
    originals = {prefix: original for original, prefix in PREFIX_CLASSES.items()}
    for module in model.modules():
        if type(module) in originals:
            module.__class__ = originals[type(module)]
        elif isinstance(getattr(module, "config", None), LayerConfig):
            module.config = module.config.model_config
