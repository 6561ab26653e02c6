"""Text tokens and image features woven into one sequence: where every fused position comes from."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


class FusePlan(NamedTuple):
    """For each fused position: the row of [text | features | zero] it takes, and the token it stems from.

    source: [B, L] int64 into a table of B * S text rows, then all feature rows, then one row of zeros.
    origin: [B, L] int64 into the B * S tokens; a feature's origin is its placeholder; -1 where a row was padded.
    is_text: [B, L] bool, False on features and padding.
    """

    source: Tensor
    origin: Tensor
    is_text: Tensor

    def embeddings(self, text: Tensor, features: Tensor) -> Tensor:
        """text [B, S, H] and features [rows, H] -> [B, L, H]; both stay in the graph, used or not."""
        width = text.shape[-1]
        table = torch.cat([text.reshape(-1, width), features.to(text.dtype), text.new_zeros(1, width)])
        return F.embedding(self.source, table)

    def per_token(self, values: Tensor, padding: int) -> Tensor:
        """values [B, S] -> [B, L] of the same dtype; features take their placeholder's value."""
        taken = values.reshape(-1)[self.origin.clamp(min=0)]
        return taken.masked_fill(self.origin < 0, padding)

    def labels(self, labels: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """labels [B, S] -> [B, L]; features and padding carry IGNORE_INDEX.

        With ``input_ids`` the token after a placeholder takes the placeholder's label (the original's rule for <end>).
        """
        if input_ids is not None:
            after = torch.zeros_like(labels, dtype=torch.bool)
            after[:, 1:] = input_ids[:, :-1] == IMAGE_TOKEN_INDEX
            labels = torch.where(after, labels.roll(1, 1), labels)
        return self.per_token(labels, IGNORE_INDEX).masked_fill(~self.is_text, IGNORE_INDEX)

    @property
    def is_image(self) -> Tensor:
        """[B, L] bool: image features."""
        return ~self.is_text & (self.origin >= 0)


def first_slots(placeholders: list[int], num_slots: int) -> list[int]:
    """The first image slot of each sample, given its number of placeholders.

    Slots are taken from left to right over the batch. A sample without a placeholder takes none, or, when the
    caller supplied one image for each such sample too, takes and leaves out one (its features get a zero gradient).
    Raises: ValueError naming the sample, what was found and what was expected.
    """
    wanted = sum(placeholders)
    with_unused = wanted + placeholders.count(0)
    if num_slots not in (wanted, with_unused):
        sample, taken = 0, 0
        for sample, count in enumerate(placeholders):  # noqa: B007  the first sample left short, else the last one
            taken += count
            if taken > num_slots:
                break
        raise ValueError(
            f"images: {num_slots} given, expected {wanted}, one for each image placeholder ({IMAGE_TOKEN_INDEX}); "
            f"sample {sample} has {placeholders[sample]} placeholders and finds "
            f"{num_slots - (taken - placeholders[sample])} images left (placeholders by sample: {placeholders})"
        )
    skips = num_slots == with_unused
    starts, at = [], 0
    for count in placeholders:
        starts.append(at)
        at += count or int(skips)
    return starts


def plan_fusing(
    input_ids: Tensor, slot_lengths: list[int], *, real: Tensor | None = None, pack: str | None = None
) -> FusePlan:
    """Replace each placeholder of ``input_ids`` by the rows of its image slot.

    Args:
        input_ids: [B, S] int64 with IMAGE_TOKEN_INDEX placeholders.
        slot_lengths: feature rows of each image slot, in order.
        real: [B, S] bool, False on padding tokens; read only with ``pack``.
        pack: None leaves padding tokens where they stand and pads shorter rows on the right; 'left' and
            'right' drop padding tokens and put all padding on that side.
    Raises: ValueError (number of images).
    """
    batch, seqlen = input_ids.shape
    device = input_ids.device
    ids = input_ids.cpu()  # the fused length is a shape, so the host has to know it
    kept = torch.ones_like(ids, dtype=torch.bool) if real is None or pack is None else real.cpu()
    found = [(row == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist() for row in ids]
    slots = first_slots([len(places) for places in found], len(slot_lengths))
    offsets = [batch * seqlen]  # where each slot's rows begin in the table
    for length in slot_lengths:
        offsets.append(offsets[-1] + length)

    rows = []
    for b, places in enumerate(found):
        token = torch.arange(seqlen)[kept[b]]
        lengths = torch.ones_like(token)
        image = ids[b, token] == IMAGE_TOKEN_INDEX
        slot = [slots[b] + i for i, place in enumerate(places) if kept[b, place]]
        lengths[image] = torch.tensor([slot_lengths[s] for s in slot], dtype=torch.int64)
        origin = (b * seqlen + token).repeat_interleave(lengths)
        source, is_text = origin.clone(), (~image).repeat_interleave(lengths)
        features = [torch.arange(offsets[s], offsets[s + 1]) for s in slot]
        if features:
            source[~is_text] = torch.cat(features)
        rows.append((source, origin, is_text))
    longest = max((len(row[0]) for row in rows), default=0)

    def stack(column: int, padding: int | bool) -> Tensor:
        short = [(row[column], longest - len(row[column])) for row in rows]
        padded = [F.pad(t, (n, 0) if pack == "left" else (0, n), value=padding) for t, n in short]
        return (torch.stack(padded) if padded else ids.new_zeros(0, 0)).to(device)

    return FusePlan(stack(0, offsets[-1]), stack(1, -1), stack(2, False).bool())
