"""LoRA adapters through peft, which is optional."""

from __future__ import annotations

ALPHA, DROPOUT = 256, 0.05
VISION_TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
# the cross attention, whose projections have the same names, is left out by the prefix
QLLAMA_TARGETS = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "down", "up")
)


def with_lora(model, targets: tuple[str, ...], rank: int, alpha: int = ALPHA, dropout: float = DROPOUT):
    """The model wrapped by peft with adapters on the named projections; only the adapters are trained.

    Raises: ImportError (peft is not installed); ValueError (rank).
    """
    if rank < 1:
        raise ValueError(f"the LoRA rank is {rank}; expected at least 1")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA adapters need peft: pip install peft") from error
    config = LoraConfig(r=rank, target_modules=list(targets), lora_alpha=alpha, lora_dropout=dropout)
    model = get_peft_model(model, config)
    model.enable_input_require_grads()
    return model
