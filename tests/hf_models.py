"""Small Hugging Face models with weights large enough for a wrong mask to show, for the tests of the models."""

from __future__ import annotations

import torch
import transformers

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
VOCABULARY = 97
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GQA = {**_TEXT, "num_key_value_heads": 2}
_LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention"]
_OLD = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "vocab_size": VOCABULARY}
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

CONFIGS = {
    "gpt2": ("GPT2", {**_OLD, **_NO_DROPOUT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neo": (
        "GPTNeo",
        {
            **_OLD,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "max_position_embeddings": 64,
            "attention_dropout": 0.0,
            "embed_dropout": 0.0,
            "resid_dropout": 0.0,
        },
    ),
    "gpt_neox": ("GPTNeoX", {**_TEXT, "rotary_pct": 0.5, "tie_word_embeddings": False}),
    "gptj": (
        "GPTJ",
        {**_OLD, **_NO_DROPOUT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    ),
    "bloom": (
        "Bloom",
        {**_OLD, "hidden_size": 48, "n_layer": 2, "n_head": 6, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    ),
    "opt": (
        "OPT",
        {
            **_OLD,
            "hidden_size": 32,
            "word_embed_proj_dim": 24,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "llama": ("Llama", _GQA),
    "qwen2": ("Qwen2", _GQA),
    "mistral": ("Mistral", {**_GQA, "sliding_window": 5}),
    "phi": ("Phi", {**_TEXT, "partial_rotary_factor": 0.5, "attention_dropout": 0.0, "resid_pdrop": 0.0}),
    "gemma": ("Gemma", {**_GQA, "head_dim": 8, "num_key_value_heads": 1}),
    "gemma3_text": ("Gemma3", {**_GQA, "head_dim": 8, "sliding_window": 5, "layer_types": _LOCAL_AND_GLOBAL}),
}
FAMILIES = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "bloom", "opt")


def model_of(name: str, attn_implementation: str | None = None, seed: int = 0, model_class=None, **fields):
    """An eval() causal LM of one of CONFIGS with random weights."""
    prefix, settings = CONFIGS[name]
    config_class = getattr(transformers, f"{prefix}TextConfig" if name == "gemma3_text" else f"{prefix}Config")
    model_class = model_class or getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(prefix, f"{prefix}ForCausalLM"))
    config = config_class(**{**settings, **fields})
    model = model_class._from_config(config, attn_implementation=attn_implementation or "eager")
    return randomised(model, seed)


def randomised(model, seed: int = 0):
    """Matrices of deviation 0.3, vectors around their initial 0 or 1; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 0.3 if p.dim() > 1 else p + noise * 0.1)
    return model.eval()


def gemma3(attn_implementation: str, **text):
    """Gemma 3 with images: blocks that see each other in both directions."""
    config = transformers.Gemma3Config(
        text_config={**_GQA, "head_dim": 8, "layer_types": _LOCAL_AND_GLOBAL, **text},
        vision_config=_SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=90,
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
    return randomised(model)


def paligemma(attn_implementation: str):
    """PaliGemma: the prompt is a prefix."""
    config = transformers.PaliGemmaConfig(
        text_config={**_GQA, "model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1},
        vision_config={**_SIGLIP, "projection_dim": 32},
        projection_dim=32,
        image_token_index=90,
    )
    model = transformers.PaliGemmaForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
    return randomised(model)
