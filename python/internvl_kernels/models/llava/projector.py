"""The layers between vision features and language-model embeddings; state-dict keys as in LLaVA checkpoints."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

_MLP = re.compile(r"mlp(\d+)x_gel")  # the original accepts every name with this beginning ("..._gelu", "..._gelu_ln")
ALLOWED = "'linear', 'mlp<k>x_gelu' (k >= 1), 'mlp<k>x_gelu_ln', 'identity', 'two_mlp'"

# two_mlp serves one tower: InternVL-14B at 336 pixels, which gives 24 x 24 patches and 96 query states
_TWO_MLP_PATCH_WIDTH = 3200
_TWO_MLP_LENGTH = 576 + 96


class IdentityProjector(nn.Module):
    """Passes the features on; the vision width must equal the language width."""

    def forward(self, features: Tensor) -> Tensor:
        return features


class TwoMLPProjector(nn.Module):
    """Separate MLPs for the patches and the query states of InternVL-14B."""

    def __init__(self, query_width: int, hidden_size: int):
        super().__init__()
        self.mlp1 = _mlp(_TWO_MLP_PATCH_WIDTH, hidden_size, 2)
        self.mlp2 = _mlp(query_width, hidden_size, 2)

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        """(patches [B, 576, 3200], queries [B, 96, M]) -> [B, 96 + 576, H], queries first.

        Raises: AssertionError when the joined length is not 672.
        """
        patches, queries = features
        out = torch.cat([self.mlp2(queries), self.mlp1(patches)], dim=1)
        assert out.shape[1] == _TWO_MLP_LENGTH, (
            f"two_mlp: {queries.shape[1]} query states and {patches.shape[1]} patches; expected 96 and 576"
        )
        return out


def _mlp(width_in: int, width_out: int, depth: int, *, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.LayerNorm(width_in)] if norm else []
    layers.append(nn.Linear(width_in, width_out))
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*layers)


def project(projector: nn.Module, features: Tensor | list[Tensor]) -> Tensor:
    """Project a tower's output (InternVL-14B's is [patches, queries]) in the projector's own dtype.

    Raises: ValueError (a projector for one tensor after a tower that gives two, or the other way round).
    """
    pair = isinstance(features, list | tuple)
    if pair != isinstance(projector, TwoMLPProjector):
        kind = "patches and query states" if pair else "one tensor of features"
        raise ValueError(f"the vision tower gives {kind}; mm_projector_type 'two_mlp' is the one for two tensors")
    weight = next(projector.parameters(), None)
    if weight is not None:
        features = [f.to(weight.dtype) for f in features] if pair else features.to(weight.dtype)
    return projector(features)


def project_nothing(projector: nn.Module, width: int) -> Tensor:
    """Features of no image, with every parameter of the projector in the graph."""
    weight = next(projector.parameters())
    if isinstance(projector, TwoMLPProjector):
        return projector((weight.new_zeros(0, 576, _TWO_MLP_PATCH_WIDTH), weight.new_zeros(0, 96, width)))
    return projector(weight.new_zeros(0, width))


def build_vision_projector(config, **_unused) -> nn.Module:
    """The projector named by ``config.mm_projector_type`` (default 'linear'), from [.., M] to [.., H].

    Args:
        config: anything with ``mm_hidden_size`` M, ``hidden_size`` H and perhaps ``mm_projector_type``.
    Returns: a module with LLaVA's keys: linear ``weight``/``bias``; mlp ``0, 2, 4, ..`` (with ``ln``
        in the name ``0`` is the norm and the linears are ``1, 3, ..``); two_mlp ``mlp1.0/2``, ``mlp2.0/2``.
    Raises: ValueError (unknown type).
    """
    kind = getattr(config, "mm_projector_type", "linear")
    width_in, width_out = config.mm_hidden_size, config.hidden_size
    if kind == "linear":
        return nn.Linear(width_in, width_out)
    if kind == "identity":
        return IdentityProjector()
    if kind == "two_mlp":
        return TwoMLPProjector(width_in, width_out)
    found = _MLP.match(kind)
    if found and int(found[1]) >= 1:
        return _mlp(width_in, width_out, int(found[1]), norm="ln" in kind)
    raise ValueError(f"mm_projector_type is {kind!r}; allowed: {ALLOWED}")
