"""Tiny LLaVA models and batches for the tests."""

from __future__ import annotations

import torch
from internvl_kernels.models.llava import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    LlavaConfig,
    LlavaLlamaForCausalLM,
    LlavaMptConfig,
    LlavaMptForCausalLM,
)

IMG, IGN = IMAGE_TOKEN_INDEX, IGNORE_INDEX
PATCHES = 4
VOCAB = 40
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 8,
}
KINDS = ("llama", "mpt")


def config_of(kind: str, **fields):
    fields = {"mm_vision_config": TOWER, "mm_projector_type": "mlp2x_gelu", "vocab_size": VOCAB, **fields}
    fields |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    if kind == "mpt":
        return LlavaMptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, **fields)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
    return LlavaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **fields)


def model_of(kind: str, seed: int = 0, **fields):
    """A model in eval mode with weights large enough that differences show."""
    torch.manual_seed(seed)
    config = config_of(kind, **fields)
    model = (LlavaMptForCausalLM if kind == "mpt" else LlavaLlamaForCausalLM)(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * 0.1)
            if name.endswith("wte.weight"):  # the head is tied to it: a large one repeats the last token
                p.mul_(0.1)
    return model


def batch() -> dict:
    """Three prompts with answers: one image, padded on the right; two images; none, padded on the right."""
    torch.manual_seed(1)
    ids = torch.tensor(
        [[1, 5, IMG, 6, 7, 8, 9, 0, 0], [1, IMG, 5, 6, IMG, 7, 8, 9, 10], [1, 11, 12, 13, 14, 15, 0, 0, 0]]
    )
    labels = torch.full_like(ids, IGN)
    labels[0, 5:7], labels[1, 6:], labels[2, 4:6] = ids[0, 5:7], ids[1, 6:], ids[2, 4:6]
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels, "images": torch.rand(3, 3, 16, 16)}


def rows_of(data: dict) -> list[dict]:
    """The samples of ``batch`` one by one, without padding, each with its own images."""
    rows, first = [], 0
    for b in range(3):
        real = data["attention_mask"][b].bool()
        count = int((data["input_ids"][b] == IMG).sum())
        row = {name: data[name][b : b + 1, real] for name in ("input_ids", "labels")}
        row["images"] = data["images"][first : first + count] if count else None
        rows.append(row)
        first += count
    return rows


def left_padded(data: dict) -> dict:
    """The same samples with their padding on the left."""
    shifts = [2, 0, 3]
    moved = dict(data)
    for name in ("input_ids", "attention_mask", "labels"):
        moved[name] = torch.stack([data[name][b].roll(shifts[b]) for b in range(3)])
    return moved
