"""The norms MPT configurations can name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def _to_autocast_dtype(tensor: Tensor | None) -> Tensor | None:
    """The tensor in the autocast dtype of its device; unchanged outside autocast."""
    if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


class LPLayerNorm(nn.LayerNorm):
    """LayerNorm computed in the autocast dtype instead of fp32; plain LayerNorm outside autocast."""

    def __init__(self, normalized_shape, eps: float = 1e-5, elementwise_affine: bool = True, device=None, dtype=None):
        super().__init__(normalized_shape, eps, elementwise_affine, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x, weight, bias = map(_to_autocast_dtype, (x, self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """``x * rsqrt(mean(x^2) + eps) * weight`` in fp32, returned in x's dtype."""

    def __init__(self, normalized_shape, eps: float = 1e-5, weight: bool = True, dtype=None, device=None):
        super().__init__()
        self.eps = eps
        self.register_parameter(
            "weight", nn.Parameter(torch.ones(normalized_shape, dtype=dtype, device=device)) if weight else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x.float(), self.weight, self.eps).to(x.dtype)


class LPRMSNorm(RMSNorm):
    """RMSNorm computed in the autocast dtype; in x's own dtype outside autocast."""

    def forward(self, x: Tensor) -> Tensor:
        low, weight = _to_autocast_dtype(x), _to_autocast_dtype(self.weight)
        with torch.autocast(x.device.type, enabled=False):
            return _rms_norm(low, weight, self.eps).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight


NORM_CLASS_REGISTRY = {
    "layernorm": nn.LayerNorm,
    "low_precision_layernorm": LPLayerNorm,
    "rmsnorm": RMSNorm,
    "low_precision_rmsnorm": LPRMSNorm,
}


def norm_class(norm_type: str) -> type[nn.Module]:
    """The class of a config's ``norm_type`` (any case).

    Raises: NotImplementedError (unknown name).
    """
    name = norm_type.lower()
    if name not in NORM_CLASS_REGISTRY:
        allowed = ", ".join(map(repr, NORM_CLASS_REGISTRY))
        raise NotImplementedError(f"norm_type is {norm_type!r}; allowed: {allowed}")
    return NORM_CLASS_REGISTRY[name]
