"""What the launches of one attention call share: derived numbers, pointers, and the key-tile prepass."""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from . import configs
from .configs import Config
from .key_tiles import key_norms_kernel, key_summary_kernel


@dataclasses.dataclass
class Call:
    """Checked arguments of one call, and what the launches derive from them."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_len: Tensor | None
    key_range: Tensor | None
    query_start: Tensor | None
    key_flags: Tensor | None
    segment_ids: Tensor | None
    alibi_slopes: Tensor | None
    softmax_scale: float
    window: int
    prune: bool

    def __post_init__(self):
        self.batch, self.seqlen_q, self.heads_q, self.head_dim = self.q.shape
        self.seqlen_k, self.heads_kv = self.k.shape[1:3]
        self.group = self.heads_q // self.heads_kv
        self.block_d = configs.block_d(self.head_dim)
        self.gpu = configs.gpu_keys(self.q.device.type, self.q.device.index)
        none = self.q.new_empty((1,), dtype=torch.int32)  # stands for tensors that were not given and are not read
        given = (self.prefix_len, self.key_range, self.query_start)
        self.terms = sum(1 << bit for bit, tensor in enumerate(given) if tensor is not None)
        self.none = none
        self.rows = {
            name: none if tensor is None else tensor
            for name, tensor in zip(("prefix_len_ptr", "key_range_ptr", "query_start_ptr"), given, strict=True)
        }
        enough = self.seqlen_k >= configs.of_gpu(configs.PRUNE_MIN_KEYS, self.gpu)
        self.prune = self.prune and self.alibi_slopes is not None and enough

    def config(self, kernel: str) -> Config:
        """The table's row for this call."""
        return configs.attention(kernel, self.gpu, self.q.dtype, self.head_dim)

    @property
    def mask_pointers(self) -> dict[str, Tensor]:
        """Pointers that every kernel with a mask takes."""
        flags = self.none if self.key_flags is None else self.key_flags
        return {**self.rows, "flags_ptr": flags}

    @property
    def pointers(self) -> dict[str, Tensor]:
        """And those of the attention kernels."""
        segments = self.none if self.segment_ids is None else self.segment_ids
        slopes = self.none if self.alibi_slopes is None else self.alibi_slopes
        return {**self.mask_pointers, "segment_ids_ptr": segments, "slopes_ptr": slopes}

    @property
    def constants(self) -> dict[str, int | bool]:
        """Compile-time constants that follow from which terms are given."""
        return {"FLAGS": self.key_flags is not None, "SEGMENTS": self.segment_ids is not None}

    @property
    def sizes(self) -> dict[str, int]:
        """Run-time numbers."""
        return {"seqlen_q": self.seqlen_q, "seqlen_k": self.seqlen_k, "window": self.window, "terms": self.terms}

    def strides(self, **tensors: Tensor) -> dict[str, int]:
        """stride_xb, stride_xs, stride_xh of [batch, seqlen, heads, head_dim] tensors."""
        return {f"stride_{n}{axis}": t.stride(a) for n, t in tensors.items() for a, axis in enumerate("bsh")}

    def section(self) -> int:
        """Query heads that are walked together: those whose keys and values fit in the L2 cache."""
        bytes_per_head = 2 * self.seqlen_k * self.head_dim * self.q.element_size()
        fits = configs.of_gpu(configs.L2_BYTES, self.gpu) // max(bytes_per_head, 1)
        return max(fits, 1) * self.group


@dataclasses.dataclass
class KeyTiles:
    """Per-tile knowledge for tiles of ``block_n`` keys; ``key_tiles.py`` has the layouts."""

    summary: Tensor
    used: Tensor
    norms: Tensor

    @property
    def pointers(self) -> dict[str, Tensor]:
        """Kernel arguments."""
        return {"summary_ptr": self.summary, "used_ptr": self.used, "norms_ptr": self.norms}


def key_tiles(call: Call, block_n: int, norms: bool, earlier: KeyTiles | None = None) -> KeyTiles:
    """Runs what the call's terms need: nothing without flags, segments and pruning."""
    tiles = triton.cdiv(call.seqlen_k, block_n)
    found = KeyTiles(call.none, call.none if earlier is None else earlier.used, call.none)
    if any(call.constants.values()):
        found.summary = call.none.new_empty((call.batch, tiles, 4))
        if call.segment_ids is not None:
            found.used = call.none.new_empty((call.batch, call.seqlen_k), dtype=torch.uint8)
        wrap_triton(key_summary_kernel)[(tiles, call.batch)](
            summary_ptr=found.summary,
            used_ptr=found.used,
            segment_ids_ptr=call.none if call.segment_ids is None else call.segment_ids,
            **call.mask_pointers,
            **call.sizes,
            **call.constants,
            BLOCK_N=block_n,
            BLOCK_P=64,
            num_warps=4,
        )
    if norms:
        found.norms = call.q.new_empty((call.batch, call.heads_kv, tiles), dtype=torch.float32)
        wrap_triton(key_norms_kernel)[(tiles, call.batch * call.heads_kv)](
            norms_ptr=found.norms,
            k_ptr=call.k,
            v_ptr=call.v,
            used_ptr=found.used,
            **call.mask_pointers,
            **call.strides(k=call.k, v=call.v),
            heads_kv=call.heads_kv,
            **call.sizes,
            **call.constants,
            HEAD_DIM=call.head_dim,
            BLOCK_D=call.block_d,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return found
