"""What is measured: shapes, masks and the useful work in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from internvl_kernels import semantics
from torch import Tensor


@dataclass(frozen=True)
class AttentionCase:
    """Prefix-LM attention with MPT's ALiBi slopes; ``prefix`` in keys; queries are the last ``seqlen_q`` positions."""

    name: str
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_kv: int
    head_dim: int
    prefix: int
    batch: int = 1

    @property
    def visible_pairs(self) -> int:
        """Visible (query, key) pairs over the whole batch and all heads."""
        mask = {"prefix_len": torch.tensor([self.prefix], dtype=torch.int32)}
        return self.batch * self.heads_q * semantics.count_visible_pairs(self.seqlen_q, self.seqlen_k, **mask)

    @property
    def forward_flops(self) -> int:
        """Two products of ``head_dim`` per visible pair; the backward is 2.5 times that."""
        return 4 * self.head_dim * self.visible_pairs

    def tensors(self, dtype: torch.dtype, requires_grad: bool = False) -> dict[str, Tensor]:
        """Random q, k, v [B, S, H, D] and the mask arguments of ``prefix_attention``."""
        generator = torch.Generator().manual_seed(0)

        def random(seqlen: int, heads: int) -> Tensor:
            shape = (self.batch, seqlen, heads, self.head_dim)
            return torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad)

        return {
            "q": random(self.seqlen_q, self.heads_q),
            "k": random(self.seqlen_k, self.heads_kv),
            "v": random(self.seqlen_k, self.heads_kv),
            "prefix_len": torch.full((self.batch,), self.prefix, dtype=torch.int32),
            "alibi_slopes": semantics.mpt_alibi_slopes(self.heads_q),
        }


def _prefill(seqlen: int, head_dim: int) -> AttentionCase:
    return AttentionCase(f"prefix-S{seqlen}-D{head_dim}", seqlen, seqlen, 16, 16, head_dim, seqlen // 4)


FORWARD = [_prefill(2048, 64), _prefill(2048, 128)]
BACKWARD = [_prefill(1024, 64), _prefill(1024, 128)]
DECODE = [
    AttentionCase("decode-multi-head-4k", 1, 4096, 16, 16, 128, 0),
    AttentionCase("decode-multi-query-32k", 1, 32768, 16, 1, 128, 0),
]
TINY = AttentionCase("tiny", 4, 4, 2, 2, 16, 2)
