"""One table for looking tokens up and for scoring them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class SharedEmbedding(nn.Embedding):
    """Embedding [V, D]; with ``unembed`` it multiplies [..., D] by the table instead: [..., V]."""

    def forward(self, input: Tensor, unembed: bool = False) -> Tensor:
        if unembed:
            return functional.linear(input, self.weight)
        return super().forward(input)
