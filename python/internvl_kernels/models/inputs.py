"""Checks that the models share: each names the argument, the place in it, what was found and what is expected."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

IGNORE_INDEX = -100


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a traced graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_id_shape(input_ids: Tensor) -> None:
    """Raises ValueError unless ``input_ids`` is an integer tensor [batch, tokens]."""
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids is a {type(input_ids).__name__}; expected an int64 tensor [batch, tokens]")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; expected int64 or int32 [batch, tokens]"
        )


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError for another shape or dtype, and for an id outside the table."""
    check_id_shape(input_ids)
    if readable(input_ids):
        _refuse((input_ids < 0) | (input_ids >= vocab_size), input_ids, "input_ids", f"0 to {vocab_size - 1}")


def check_given(input_ids: Tensor | None, inputs_embeds: Tensor | None, vocab_size: int, width: int) -> tuple[int, int]:
    """[batch, tokens] of the one that is given. Raises: ValueError (neither; ids; shape of the embeddings)."""
    if inputs_embeds is None:
        check_ids(input_ids, vocab_size)
        return tuple(input_ids.shape)
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != width:
        raise ValueError(f"inputs_embeds has shape {list(inputs_embeds.shape)}; expected [batch, tokens, {width}]")
    return tuple(inputs_embeds.shape[:2])


def check_labels(
    labels: Tensor | None, vocab_size: int, shape: tuple[int, int] | None = None, placeholder: int = IGNORE_INDEX
) -> None:
    """Raises ValueError for another ``shape`` (None: any), and for a label that is no token and not ignored.

    placeholder: another value that is never learned.
    """
    if labels is None:
        return
    if shape is not None and tuple(labels.shape) != tuple(shape):
        raise ValueError(f"labels has shape {list(labels.shape)}; expected [batch, tokens] = {list(shape)}")
    if readable(labels):
        wrong = ((labels < 0) | (labels >= vocab_size)) & (labels != IGNORE_INDEX) & (labels != placeholder)
        _refuse(wrong, labels, "labels", f"0 to {vocab_size - 1}, and {IGNORE_INDEX} for what is not learned")


def _refuse(wrong: Tensor, values: Tensor, name: str, allowed: str) -> None:
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}{place} is {int(values[tuple(place)])}; allowed: {allowed}")


def check_cache_layers(cache: Cache, n_layers: int, expected: tuple[int, int, int]) -> None:
    """Raises ValueError unless the filled layers of a cache are none or all of this model, of ``expected`` sizes.

    expected: batch, key-value heads, head dim.
    """
    layers = getattr(cache, "layers", None) or ()
    filled = [(i, x.keys) for i, x in enumerate(layers) if isinstance(getattr(x, "keys", None), Tensor)]
    filled = [(i, keys) for i, keys in filled if keys.dim() == 4 and keys.shape[2]]
    if len(layers) > n_layers or 0 < len(filled) < n_layers:
        held = len(layers) if len(layers) > n_layers else len(filled)
        raise ValueError(f"past_key_values holds {held} layers; this model has {n_layers}")
    for index, keys in filled[:1]:
        if (keys.shape[0], keys.shape[1], keys.shape[3]) != expected:
            raise ValueError(
                f"past_key_values, layer {index}: key has shape {list(keys.shape)}; expected "
                f"[{expected[0]}, {expected[1]}, tokens, {expected[2]}], the cache of this model and batch"
            )


def check_room(cache, new: int) -> None:
    """Raises ValueError when a static cache has no slots for ``new`` tokens more."""
    layers = getattr(cache, "layers", None)
    room = getattr(layers[0], "max_cache_len", None) if layers and getattr(cache, "is_compileable", False) else None
    if room is None or torch.compiler.is_compiling():
        return
    held = int(cache.get_seq_length())
    if held + new > room:
        raise ValueError(f"past_key_values has room for {room} tokens and holds {held}; {new} more do not fit")
