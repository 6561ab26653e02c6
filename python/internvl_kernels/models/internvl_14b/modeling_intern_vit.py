"""InternViT: a vision transformer with QK RMSNorm and layer scales, over the kernels."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from ...functional import prefix_attention
from ..checkpoint import CheckedLoading
from .configuration_intern_vit import InternVisionConfig


class InternRMSNorm(nn.Module):
    """``x * rsqrt(mean(x^2) + eps)`` in fp32, rounded to x's dtype, times weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class DropPath(nn.Module):
    """Stochastic depth: in training, a sample's branch is dropped with probability ``drop_prob``."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        drawn = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * drawn / keep if keep else x * 0


class InternVisionEmbeddings(nn.Module):
    """[class, patches] plus positions; the patch positions are interpolated from their square grid to the image's."""

    def __init__(self, config: InternVisionConfig):
        super().__init__()
        self.config = config
        self.embed_dim = config.hidden_size
        self.image_size, self.patch_size = config.image_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, self.embed_dim))
        self.patch_embedding = nn.Conv2d(config.num_channels, self.embed_dim, self.patch_size, self.patch_size)
        self.num_patches = (self.image_size // self.patch_size) ** 2
        self.num_positions = self.num_patches + 1
        self.position_embedding = nn.Parameter(torch.randn(1, self.num_positions, self.embed_dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, H, W] -> [B, 1 + (H // patch) * (W // patch), hidden_size]."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # [B, D, h, w]
        height, width = patches.shape[2:]
        patches = rearrange(patches, "b d h w -> b (h w) d")
        classes = self.class_embedding.expand(patches.shape[0], -1, -1).to(patches.dtype)
        return torch.cat([classes, patches], 1) + self.positions(height, width).to(patches.dtype)

    def positions(self, height: int, width: int) -> Tensor:
        """The position table [1, 1 + height * width, hidden_size] for a grid of patches."""
        grid = self.image_size // self.patch_size
        if (height, width) == (grid, grid):
            return self.position_embedding
        table = self.position_embedding
        return torch.cat([table[:, :1], _interpolated(table[:, 1:], grid, height, width)], 1)

    def resize(self, image_size: int) -> None:
        """Make the interpolated table of ``image_size`` the parameter, and that size the configured one."""
        grid, wanted = self.image_size // self.patch_size, image_size // self.patch_size
        table = self.position_embedding
        patches = _interpolated(table[:, 1:], grid, wanted, wanted)
        self.position_embedding = nn.Parameter(torch.cat([table[:, :1], patches], 1).detach(), table.requires_grad)
        self.image_size = self.config.image_size = image_size
        self.num_patches = wanted**2
        self.num_positions = self.num_patches + 1


def _interpolated(table: Tensor, grid: int, height: int, width: int) -> Tensor:
    """Bicubic, fp32: [1, grid * grid, D] -> [1, height * width, D] in the table's dtype."""
    image = rearrange(table.float(), "1 (h w) d -> 1 d h w", h=grid)
    image = functional.interpolate(image, size=(height, width), mode="bicubic", align_corners=False)
    return rearrange(image, "1 d h w -> 1 (h w) d").to(table.dtype)


class InternAttention(nn.Module):
    """Full self-attention of a fused projection; q and k are normalised over all heads together."""

    def __init__(self, config: InternVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.scale = self.head_dim**-0.5
        self.qk_normalization = config.qk_normalization
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj_drop = nn.Dropout(config.dropout)
        if self.qk_normalization:
            self.q_norm = InternRMSNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.k_norm = InternRMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.config.attention_dropout and self.training:
            raise NotImplementedError(
                f"attention_dropout is {self.config.attention_dropout} while training; the kernels have no dropout "
                "inside attention: set it to 0"
            )
        q, k, v = self.qkv(hidden_states).chunk(3, dim=-1)
        if self.qk_normalization:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k, v = (rearrange(t, "b s (h d) -> b s h d", d=self.head_dim) for t in (q, k, v))
        out = prefix_attention(q, k, v, prefix_len=k.shape[1], softmax_scale=self.scale)
        return self.proj_drop(self.proj(rearrange(out, "b s h d -> b s (h d)")))


class InternMLP(nn.Module):
    """``fc2(act(fc1(x)))``; the GELU is the exact one."""

    def __init__(self, config: InternVisionConfig):
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class InternVisionEncoderLayer(GradientCheckpointingLayer):
    """``x + ls1 * attn(norm1(x))``, then ``x + ls2 * mlp(norm2(x))``."""

    def __init__(self, config: InternVisionConfig, drop_path_rate: float):
        super().__init__()
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = InternRMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = InternRMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.drop_path1 = DropPath(drop_path_rate)
        self.drop_path2 = DropPath(drop_path_rate)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.drop_path1(self.attn(self.norm1(hidden_states)) * self.ls1)
        return hidden_states + self.drop_path2(self.mlp(self.norm2(hidden_states)) * self.ls2)


class InternVisionEncoder(nn.Module):
    """The layers; while training they recompute their activations unless checkpointing is disabled."""

    def __init__(self, config: InternVisionConfig):
        super().__init__()
        self.config = config
        count, rate = config.num_hidden_layers, config.drop_path_rate
        rates = [rate * i / max(count - 1, 1) for i in range(count)]
        self.layers = nn.ModuleList(InternVisionEncoderLayer(config, rate) for rate in rates)
        for layer in self.layers:
            layer._gradient_checkpointing_func = _checkpoint
            layer.gradient_checkpointing = True

    def forward(self, inputs_embeds: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None):
        """Returns: last_hidden_state; hidden_states: the input and the result of every layer."""
        hidden_states, states = inputs_embeds, (inputs_embeds,)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            if output_hidden_states:
                states = (*states, hidden_states)
        result = BaseModelOutput(
            last_hidden_state=hidden_states, hidden_states=states if output_hidden_states else None
        )
        return result.to_tuple() if return_dict is False else result


class InternVisionModel(CheckedLoading, PreTrainedModel):
    """InternViT without a final norm; ``pooler_output`` is the class position of the last state."""

    config_class = InternVisionConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVisionEncoderLayer"]  # noqa: RUF012  (transformers reads it from the class)
    _can_compile_fullgraph = True

    def __init__(self, config: InternVisionConfig):
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_vision_weights(module, self.config)

    def get_input_embeddings(self) -> InternVisionEmbeddings:
        return self.embeddings

    def resize_pos_embeddings(self, old_size: int, new_size: int, patch_size: int) -> None:
        """Replace the position table by the one interpolated from images of ``old_size`` to ``new_size``.

        Raises: ValueError (sizes that are not this model's).
        """
        own = (self.embeddings.image_size, self.embeddings.patch_size)
        if (old_size, patch_size) != own or new_size < patch_size:
            raise ValueError(
                f"old_size={old_size}, new_size={new_size}, patch_size={patch_size}; this model has image_size="
                f"{own[0]} and patch_size={own[1]}, and new_size is at least one patch"
            )
        self.embeddings.resize(new_size)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_embeds: Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Args:
            pixel_values: [B, C, H, W]; H and W of at least one patch, what exceeds whole patches is cut off.
            pixel_embeds: [B, S, hidden_size] instead, past the embedding.
        Returns: last_hidden_state [B, S, hidden_size]; pooler_output [B, hidden_size]; hidden_states (the embedding
            and every layer's result) with ``output_hidden_states``.
        Raises: ValueError (neither given, rank, channels, size, width).
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        embeds = self._embed(pixel_values, pixel_embeds)
        encoded = self.encoder(embeds, output_hidden_states=output_hidden_states)
        last = encoded.last_hidden_state
        result = BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=last[:, 0], hidden_states=encoded.hidden_states
        )
        return result.to_tuple() if return_dict is False else result

    def _embed(self, pixel_values: Tensor | None, pixel_embeds: Tensor | None) -> Tensor:
        config = self.config
        if pixel_embeds is not None:
            if pixel_embeds.dim() != 3 or pixel_embeds.shape[2] != config.hidden_size:
                raise ValueError(
                    f"pixel_embeds has shape {list(pixel_embeds.shape)}; expected [batch, patches, hidden_size = "
                    f"{config.hidden_size}]"
                )
            return pixel_embeds
        if pixel_values is None:
            raise ValueError("neither pixel_values nor pixel_embeds were given; pass one of them")
        patch = config.patch_size
        if (
            pixel_values.dim() != 4
            or pixel_values.shape[1] != config.num_channels
            or min(pixel_values.shape[2:]) < patch
        ):
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)}; expected [batch, channels = "
                f"{config.num_channels}, height, width] of at least one patch ({patch} x {patch})"
            )
        return self.embeddings(pixel_values)


def init_vision_weights(module: nn.Module, config: InternVisionConfig) -> None:
    """The parameters that transformers' own initialisation does not know."""
    if isinstance(module, InternVisionEmbeddings):
        nn.init.normal_(module.class_embedding)
        nn.init.normal_(module.position_embedding)
    elif isinstance(module, InternVisionEncoderLayer):
        nn.init.constant_(module.ls1, config.initializer_factor)
        nn.init.constant_(module.ls2, config.initializer_factor)


def _checkpoint(function, *args):
    """What the layers use until ``gradient_checkpointing_enable`` brings its own."""
    return checkpoint(function, *args, use_reentrant=False)
