"""What a configuration of transformers' ``MptForCausalLM`` means in the fields of ``MPTConfig``."""

from __future__ import annotations

# Fields of a transformers configuration that its class reads, and what the others amount to.
READ_BY_TRANSFORMERS = ("clip_qkv", "softmax_scale", "attn_pdrop")
FIXED = {
    "expansion_ratio": 4,
    "no_bias": True,
    "norm_type": "layernorm",
    "logit_scale": None,
    "embedding_fraction": 1.0,
    "emb_pdrop": 0.0,
}
FIXED_ATTENTION = {
    "attn_type": "multihead_attention",
    "qk_ln": False,
    "prefix_lm": False,
    "attn_uses_sequence_id": False,
    "alibi": True,
    "alibi_bias_max": 8,
}


def written_by_transformers(fields: dict) -> bool:
    """Whether a config.json belongs to transformers' own classes (MptForCausalLM), not to MPTForCausalLM."""
    return any(str(name).startswith("Mpt") for name in fields.get("architectures") or ())


def fields_from_transformers(fields: dict) -> dict:
    """The fields of transformers' configuration as those of ``MPTConfig`` that mean the same."""
    attn = fields.get("attn_config") or {}
    attn = attn if isinstance(attn, dict) else attn.to_dict()
    read = {name: attn[name] for name in READ_BY_TRANSFORMERS if name in attn}
    return {
        **fields,
        **FIXED,
        "resid_pdrop": read.get("attn_pdrop", 0),  # transformers drops the residual branches by this figure
        "attn_config": {**FIXED_ATTENTION, **read},
    }
