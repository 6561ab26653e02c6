"""transformers' ``MptForCausalLM`` and this package's MPT: the same weights under both configurations.

transformers' class computes multi-head attention with ALiBi and no biases, whatever else its configuration says; the
weights have the same names and shapes in both.
"""

from __future__ import annotations

import torch
from transformers import MptConfig, MptForCausalLM

from .configuration_mpt import MPTConfig
from .hf_fields import FIXED, FIXED_ATTENTION, READ_BY_TRANSFORMERS, fields_from_transformers
from .modeling_mpt import MPTForCausalLM

_SAME = ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size", "layer_norm_epsilon", "use_cache")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def from_transformers(model: MptForCausalLM) -> MPTForCausalLM:
    """This package's model over the parameters of ``model`` (shared, not copied)."""
    config = MPTConfig(**fields_from_transformers(model.config.to_dict()))
    state = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    return _filled(MPTForCausalLM, config, state, model.training)


def to_transformers(model: MPTForCausalLM) -> MptForCausalLM:
    """transformers' model over the parameters of ``model`` (shared, not copied).

    Raises: ValueError naming every setting that transformers' class cannot express.
    """
    config = model.config
    _check_expressible(config)
    hf_config = MptConfig(
        **{name: getattr(config, name, None) for name in (*_SAME, *_TOKENS)},
        # transformers 5 declares attn_pdrop an int: 0.0 is left to its default
        attn_config={name: config.attn_config[name] for name in READ_BY_TRANSFORMERS if config.attn_config[name]},
    )
    return _filled(MptForCausalLM, hf_config, model.state_dict(), model.training)


def _filled(kind, config, state: dict, training: bool):
    with torch.device("meta"):
        model = kind(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    wrong = [*unexpected, *(key for key in missing if key != "lm_head.weight")]
    if wrong:
        raise ValueError(f"{kind.__name__} and the given weights disagree about {', '.join(sorted(wrong)[:4])}")
    return model.train(training)


def _check_expressible(config: MPTConfig) -> None:
    found = {name: getattr(config, name) for name in FIXED}
    found |= {f"attn_config[{name!r}]": config.attn_config[name] for name in FIXED_ATTENTION}
    wanted = {**FIXED, **{f"attn_config[{name!r}]": value for name, value in FIXED_ATTENTION.items()}}
    if found["norm_type"].lower() == "low_precision_layernorm":
        found["norm_type"] = "layernorm"  # the same outside autocast
    found["resid_pdrop"], wanted["resid_pdrop"] = config.resid_pdrop, config.attn_config["attn_pdrop"]
    wrong = [f"{name} is {found[name]!r}, expected {wanted[name]!r}" for name in wanted if found[name] != wanted[name]]
    if wrong:
        raise ValueError(f"transformers' MptForCausalLM cannot express this model: {'; '.join(wrong)}")
