"""Reads back what a transformers mask function means, so that it need not be evaluated over S x S positions.

transformers composes masks from functions of (batch, head, query, key) index. The compositions its models use are
recognised here by the functions' names and what they close over; for every other one the answer is None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import masking_utils

_BIDIRECTIONAL = getattr(masking_utils, "bidirectional_mask_function", None)  # None: transformers 4


@dataclass(frozen=True)
class Pattern:
    """(causal and in the window and in the same segment), or in the same block.

    causal False: every key (then nothing else is set). blocks_in_window: the window also limits the keys of the
    query's own block, on the side of the past.
    """

    causal: bool = True
    window: int | None = None
    segment_ids: Tensor | None = None
    block_ids: Tensor | None = None
    blocks_in_window: bool = False


@dataclass(frozen=True)
class _Piece:
    """A part that means nothing alone: exactly one field is set."""

    window: int | None = None
    segment_ids: Tensor | None = None
    block_ids: Tensor | None = None


def recognise(mask_function: Callable) -> Pattern | None:
    """The pattern of a mask function, or None when it cannot be told.

    A tracer (``torch.compile``) can compare functions, but not look into them: all others than the two plain ones break
    the graph once, before the layers.
    """
    if mask_function is masking_utils.causal_mask_function:
        return Pattern()
    if mask_function is _BIDIRECTIONAL:
        return Pattern(causal=False)
    found = _read(mask_function)
    return found if isinstance(found, Pattern) else None


def _read(function: Callable) -> Pattern | _Piece | None:
    name = getattr(function, "__qualname__", "")
    if getattr(function, "__module__", "").split(".")[0] != "transformers":
        return None
    reader = _READERS.get(name)
    if reader is None:
        return None
    cells = function.__closure__ or ()
    return reader(**{k: c.cell_contents for k, c in zip(function.__code__.co_freevars, cells, strict=True)})


def _all_of(mask_functions) -> Pattern | _Piece | None:
    parts = [_read(f) for f in mask_functions]
    patterns = [p for p in parts if isinstance(p, Pattern)]
    if None in parts or len(patterns) != 1 or not patterns[0].causal:
        return None
    found = patterns[0]
    for piece in (part for part in parts if isinstance(part, _Piece)):
        if piece.window is not None and found.window is None:
            found = replace(found, window=piece.window, blocks_in_window=found.block_ids is not None)
        elif piece.segment_ids is not None and found.segment_ids is None and found.block_ids is None:
            found = replace(found, segment_ids=piece.segment_ids)
        else:
            return None
    return found


def _any_of(mask_functions) -> Pattern | None:
    parts = [_read(f) for f in mask_functions]
    if len(parts) != 2 or not isinstance(parts[0], Pattern) or not isinstance(parts[1], _Piece):
        return None
    found, piece = parts
    if not found.causal or piece.block_ids is None or found.block_ids is not None or found.segment_ids is not None:
        return None
    return replace(found, block_ids=piece.block_ids)


def _image_blocks(token_type_ids: Tensor, image_group_ids: Tensor) -> _Piece:
    return _Piece(block_ids=torch.where(token_type_ids == 1, image_group_ids, -1))


def _own_positions(mask_function, position_ids) -> Pattern | None:
    """Positions count up by one inside a segment, so that comparing them is comparing indices."""
    found = _read(mask_function)
    return found if isinstance(found, Pattern) and found.block_ids is None else None


_READERS = {
    "causal_mask_function": lambda: Pattern(),
    "bidirectional_mask_function": lambda: Pattern(causal=False),
    "and_masks.<locals>.and_mask": lambda mask_functions: _all_of(mask_functions),
    "or_masks.<locals>.or_mask": lambda mask_functions: _any_of(mask_functions),
    "sliding_window_overlay.<locals>.inner_mask": lambda sliding_window: _Piece(window=sliding_window),
    "packed_sequence_mask_function.<locals>.inner_mask": lambda packed_sequence_mask: _Piece(
        segment_ids=packed_sequence_mask
    ),
    "remap_positions_for_packed_sequence.<locals>.inner_mask": _own_positions,
    "blockwise_overlay.<locals>.inner_mask": lambda block_sequence_ids: _Piece(block_ids=block_sequence_ids),
    "token_type_ids_mask_function.<locals>.inner_mask": _image_blocks,  # Gemma 3 before transformers 5
}
