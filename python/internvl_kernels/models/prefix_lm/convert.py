"""A causal LM into a prefix LM, and back."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .carriers import PrefixLMError
from .layers import check_layers, install, uninstall
from .model import PrefixLM, prefix_class


def convert_hf_causal_lm_to_prefix_lm(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a Hugging Face causal LM into a prefix LM, in place.

    A query sees key k when k is real and (k <= query or bidirectional_mask[b, k]): ``forward(bidirectional_mask=...)``
    opens any set of keys to every query, through the fused kernels. Without the mask the model computes what it
    computed before, bit for bit. ``generate`` takes the prompt as the prefix.

    Args:
        model: GPT-2, GPT-Neo, GPT-NeoX, GPT-J, BLOOM, OPT, or any causal LM on the attention interface. One that is
            converted already stays as it is.
    Returns: the same object; parameters, buffers and state-dict keys are untouched. ``config.prefix_lm`` is True.
    Raises: TypeError (not such a model); ValueError (cross attention, layers that cannot see a prefix). The model then
        stays as it was.
    """
    if isinstance(model, PrefixLM):
        return model
    name = type(model).__name__
    causal = {c for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for c in _names(value)}
    if not isinstance(model, PreTrainedModel) or not any(c.__name__ in causal for c in type(model).__mro__):
        raise TypeError(f"{name} is not a causal LM of transformers (such as GPT2LMHeadModel or LlamaForCausalLM)")
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"{name} is an encoder-decoder; only decoders can become prefix LMs")
    if getattr(model.config, "add_cross_attention", False):
        raise PrefixLMError(f"{name} has cross attention (config.add_cross_attention); only decoders without it")
    check_layers(model)
    combined = prefix_class(type(model))
    install(model)
    model.__class__ = combined
    model.config.prefix_lm = True
    return model


def revert_prefix_lm(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``convert_hf_causal_lm_to_prefix_lm``, in place; a model that was not converted stays as it is."""
    if isinstance(model, PrefixLM):
        uninstall(model)
        model.__class__ = model._prefix_lm_base
        del model.config.prefix_lm
    return model


def load_prefix_lm(path: str, **kwargs) -> PreTrainedModel:
    """Load what ``save_pretrained`` of a converted model wrote.

    Args:
        path: folder or name of the Hub.
        kwargs: of ``AutoModelForCausalLM.from_pretrained``.
    Raises: ValueError when the checkpoint is not that of a prefix LM.
    """
    config = kwargs.get("config")
    hub = {k: kwargs[k] for k in ("cache_dir", "local_files_only", "revision", "subfolder", "token") if k in kwargs}
    config = AutoConfig.from_pretrained(path, **hub) if config is None else config
    if not getattr(config, "prefix_lm", False):
        raise ValueError(
            f"{path} was not saved by a prefix LM (config.prefix_lm is missing); load it with AutoModelForCausalLM and "
            "convert it"
        )
    return convert_hf_causal_lm_to_prefix_lm(AutoModelForCausalLM.from_pretrained(path, **kwargs))


def _names(value) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else (value,)
