"""Muon for a small model on the CPU: the momentum of every weight matrix is made orthogonal before it is applied.

PyTorch has ``torch.optim.Muon``; this one keeps fp32 (bf16 products are slow on most CPUs) and treats all matrices
of one shape as a batch, which matters when a step takes a fifth of a second. It needs about half of AdamW's steps.
Source: Jordan et al. 2024 (the iteration and its coefficients), Liu et al. 2025 (the scale that matches AdamW's).
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """[n, rows, columns] with rows <= columns -> the same with singular values near 1 (Newton-Schulz iteration)."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Updates 2-D parameters; give everything else to AdamW."""

    def __init__(self, parameters, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for shape, matrices in by_shape.items():
                self._step_one_shape(matrices, group, group["lr"] * 0.2 * shape[1] ** 0.5)

    def _step_one_shape(self, matrices: list[Tensor], group: dict, size: float) -> None:
        gradient = torch.stack([_wide(p.grad) for p in matrices])
        state = self.state[matrices[0]]  # one momentum for the whole batch
        average = state.setdefault("momentum", torch.zeros_like(gradient))
        average.lerp_(gradient, 1 - group["momentum"])
        update = orthogonal(gradient.lerp(average, group["momentum"]))
        for p, change in zip(matrices, update, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            _wide(p).add_(change, alpha=-size)


def _wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transposed view when it has more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
