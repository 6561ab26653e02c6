"""Models that read a picture, to be measured: LLaVA over LLaMA and MPT, Q-LLaMA, InternVL-14B, all in small."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from internvl_kernels.models.internvl_14b import InternVLConfig, InternVLModel
from internvl_kernels.models.llava import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    LlavaConfig,
    LlavaLlamaForCausalLM,
    LlavaMptConfig,
    LlavaMptForCausalLM,
)
from internvl_kernels.models.qllama import LlamaForCausalLM as QLlamaForCausalLM
from internvl_kernels.models.qllama import QLlamaConfig
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration
from transformers import LlavaConfig as TheirLlavaConfig

from .exchange import Dense, Exchanged
from .families import Family, Implementations, Sizes, hf_mpt, llama_config, token_ids

PATCH, TEXT_BEFORE = 14, 16  # pixels on a side of a patch; tokens in front of the picture
QUERY_TOKENS, VISION_TOKENS, VISION_WIDTH = 96, 1025, 3200  # InternVL-14B's


def _tower(sizes: Sizes) -> dict:
    """A narrow CLIP: the language model is what is measured."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": PATCH * sizes.image_side,
        "patch_size": PATCH,
    }


def _picture(side: int, dtype: torch.dtype) -> Tensor:
    pixels = torch.randn(1, 3, PATCH * side, PATCH * side, generator=torch.Generator().manual_seed(1))
    return pixels.to(dtype)


def _llava(sizes: Sizes, dtype: torch.dtype) -> Implementations:
    """LLaVA over LLaMA, causal, against transformers' LLaVA with SDPA and eager attention."""
    config = LlavaConfig(**llama_config(sizes), mm_vision_config=_tower(sizes), mm_projector_type="mlp2x_gelu")
    ours = LlavaLlamaForCausalLM(config)
    found = {"ours": ours.to(dtype)}
    text = {**llama_config(sizes), "model_type": "llama"}
    for name in ("sdpa", "eager"):
        described = TheirLlavaConfig(
            vision_config=CLIPVisionConfig(**_tower(sizes)),
            text_config=text,
            image_token_index=sizes.vocabulary - 1,
            image_seq_length=sizes.image_side**2,
        )
        theirs = LlavaForConditionalGeneration._from_config(described, attn_implementation=name)
        inner = theirs.model
        inner.vision_tower.load_state_dict(ours.get_vision_tower().vision_tower.state_dict())
        inner.multi_modal_projector.linear_1.load_state_dict(ours.model.mm_projector[0].state_dict())
        inner.multi_modal_projector.linear_2.load_state_dict(ours.model.mm_projector[2].state_dict())
        language = {k: v for k, v in ours.model.state_dict().items() if not k.startswith(("mm_", "vision_"))}
        inner.language_model.load_state_dict(language)
        theirs.lm_head.load_state_dict(ours.lm_head.state_dict())
        inner.vision_tower.requires_grad_(False)  # as in ours
        found[name] = theirs.to(dtype)
    return found


def _llava_inputs(module: nn.Module, sizes: Sizes, seqlen: int, mode: str) -> dict[str, Tensor]:
    """A picture after a little text, ``seqlen`` positions in all; transformers wants a token for each patch."""
    patches = sizes.image_side**2
    text = token_ids(sizes, seqlen - patches) % (sizes.vocabulary - 1)  # the last one stands for a patch
    theirs = isinstance(module, LlavaForConditionalGeneration)
    image = torch.full((1, patches), sizes.vocabulary - 1) if theirs else torch.tensor([[IMAGE_TOKEN_INDEX]])
    ids = torch.cat([text[:, :TEXT_BEFORE], image, text[:, TEXT_BEFORE:]], 1)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found["pixel_values" if theirs else "images"] = _picture(sizes.image_side, next(module.parameters()).dtype)
    if mode == "train":
        hidden = (ids == IMAGE_TOKEN_INDEX) | (ids == sizes.vocabulary - 1)
        found["labels"] = ids.masked_fill(hidden, IGNORE_INDEX)
    return found


class _HfMptWithImages(nn.Module):
    """transformers' MPT on the embeddings that our LLaVA fuses: it has no LLaVA over MPT."""

    def __init__(self, ours: LlavaMptForCausalLM, theirs: nn.Module) -> None:
        super().__init__()
        self.ours, self.theirs = ours, theirs

    def _fused(self, input_ids: Tensor, attention_mask: Tensor, images: Tensor, labels: Tensor | None = None) -> dict:
        fused = self.ours.fuse(input_ids, attention_mask, images, labels)
        found = {"inputs_embeds": fused.inputs_embeds, "attention_mask": fused.real.long()}
        return found if labels is None else {**found, "labels": fused.plan.labels(labels)}

    def forward(self, input_ids, attention_mask, images, labels=None, use_cache=None):
        return self.theirs(**self._fused(input_ids, attention_mask, images, labels), use_cache=use_cache)

    def generate(self, input_ids, attention_mask, images, **kwargs):
        return self.theirs.generate(**self._fused(input_ids, attention_mask, images), **kwargs)


def _llava_mpt(sizes: Sizes, dtype: torch.dtype) -> Implementations:
    """LLaVA over MPT, causal, against transformers' MPT on the same embeddings."""
    ours = LlavaMptForCausalLM(
        LlavaMptConfig(
            d_model=sizes.width,
            n_heads=sizes.heads,
            n_layers=sizes.layers,
            max_seq_len=sizes.positions,
            vocab_size=sizes.vocabulary,
            norm_type="layernorm",
            use_cache=True,
            mm_vision_config=_tower(sizes),
            mm_projector_type="mlp2x_gelu",
        )
    ).to(dtype)
    state = {k: v for k, v in ours.state_dict().items() if "mm_projector" not in k and "vision_tower" not in k}
    return {"ours": ours, "hf": _HfMptWithImages(ours, hf_mpt(sizes, state).to(dtype))}


def _exchanged(ours: nn.Module) -> Implementations:
    """transformers has no such model: the peers are ours with dense attention in plain PyTorch."""
    return {"ours": ours, **{name: Exchanged(ours, lambda name=name: Dense(name)) for name in ("sdpa", "eager")}}


def _qllama(sizes: Sizes, dtype: torch.dtype) -> Implementations:
    """Q-LLaMA: 96 query tokens that see one another and the vision states, causal text behind them."""
    config = QLlamaConfig(
        **llama_config(sizes), num_query_token=QUERY_TOKENS, vision_hidden_size=VISION_WIDTH if sizes.heads > 4 else 256
    )
    return _exchanged(QLlamaForCausalLM(config).to(dtype))


def _qllama_inputs(module: nn.Module, sizes: Sizes, seqlen: int, mode: str) -> dict[str, Tensor]:
    """The query tokens stand in front."""
    ids = token_ids(sizes, seqlen)
    generator = torch.Generator().manual_seed(1)
    vision = torch.randn(1, VISION_TOKENS, module.config.vision_hidden_size, generator=generator)
    labels = ids.masked_fill(torch.arange(seqlen) < QUERY_TOKENS, IGNORE_INDEX)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "vision_hidden_states": vision.to(module.dtype),
        "use_zero_attention_mask": True,
        **({"labels": labels} if mode == "train" else {}),
    }


class _ImageFeatures(nn.Module):
    """InternVL-14B's image features as a model with logits and a loss."""

    def __init__(self, model: InternVLModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: bool = False, use_cache: bool = False) -> SimpleNamespace:
        states = self.model.get_image_features(pixel_values)[1]
        return SimpleNamespace(logits=states, loss=states.float().square().mean() if labels else None)


def _internvl(sizes: Sizes, dtype: torch.dtype) -> Implementations:
    """InternViT read by the query tokens of a Q-LLaMA; bidirectional throughout."""
    vision = {
        "hidden_size": sizes.width,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.mlp_ratio * sizes.width,
        "num_hidden_layers": sizes.layers,
        "image_size": PATCH * _side(sizes.seqlen),
        "patch_size": PATCH,
    }
    config = InternVLConfig(vision_config=vision, qllama_config=llama_config(sizes), num_query_token=QUERY_TOKENS)
    model = InternVLModel(config)
    for layer in model.vision_model.encoder.layers:
        layer.gradient_checkpointing = False  # InternViT's default is to recompute
    nn.init.normal_(model.query_tokens)
    return _exchanged(_ImageFeatures(model).to(dtype))


def _side(seqlen: int) -> int:
    """Patches on a side, so that they and the class position come to at most ``seqlen``."""
    return max(1, int((seqlen - 1) ** 0.5))


def _internvl_inputs(module: nn.Module, _sizes: Sizes, seqlen: int, mode: str) -> dict[str, Tensor]:
    picture = _picture(_side(seqlen), next(module.parameters()).dtype)
    return {"pixel_values": picture, **({"labels": True} if mode == "train" else {})}


FAMILIES = {
    "qllama": Family(_qllama, _qllama_inputs, ("prefill", "train"), lambda _sizes: QUERY_TOKENS + 1),
    "internvl-14b": Family(_internvl, _internvl_inputs, ("prefill", "train"), lambda _sizes: 2),
    "llava-llama": Family(_llava, _llava_inputs, shortest=lambda sizes: sizes.image_side**2 + 2 * TEXT_BEFORE),
    "llava-mpt": Family(_llava_mpt, _llava_inputs, shortest=lambda sizes: sizes.image_side**2 + 2 * TEXT_BEFORE),
}
