"""Pictures of several handwritten digits, made from scikit-learn's scans, and the small vocabulary that names them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PICTURE = 48  # pixels on a side of a picture
DIGIT = 16  # pixels on a side of an undistorted digit: the scans have 8
TILE = 24  # pixels on a side of the window a distorted digit is drawn in
COLUMNS, ROWS = 3, 2  # a picture is read line by line, like text
MIN_DIGITS, MAX_DIGITS = 3, 5

WORDS = ["<pad>", "<s>", "</s>", "read", "the", "digits", ":", *"0123456789"]
PAD, START, END = 0, 1, 2
FIRST_DIGIT = WORDS.index("0")
QUESTION = [WORDS.index(word) for word in ("read", "the", "digits", ":")]


class Scans(NamedTuple):
    """Single digits as scanned: ``ink`` [n, 1, 8, 8] fp32 from 0 (paper) to 1 (full stroke), ``digit`` [n] int64."""

    ink: Tensor
    digit: Tensor


class Pictures(NamedTuple):
    """``ink`` [n, 1, PICTURE, PICTURE] fp32, about 0 to 1; ``digits`` [n, MAX_DIGITS] int64, -1 after the last one."""

    ink: Tensor
    digits: Tensor

    def texts(self) -> list[str]:
        return ["".join(str(d) for d in row if d >= 0) for row in self.digits.tolist()]


class Hand(NamedTuple):
    """How much a writer's hand varies. Shares are of the digit's size, angles in radians; all are upper bounds."""

    turn: float
    slant: float
    size: float
    shift: float  # in pixels
    bend: float  # smooth warp of the strokes
    fade: float  # loss of contrast
    noise: float  # standard deviation of the pixel noise, always present


# training sees a wider range than the question asked afterwards, so that 1497 scans are enough
TRAINING_HAND = Hand(turn=0.25, slant=0.2, size=0.15, shift=1.25, bend=0.08, fade=0.4, noise=0.08)
READING_HAND = Hand(turn=0.1, slant=0.08, size=0.06, shift=0.6, bend=0.0, fade=0.2, noise=0.06)


def load_scans(seed: int, held_out: int = 300) -> tuple[Scans, Scans]:
    """scikit-learn's 1797 scans of real handwriting as (training, held-out); no scan is in both."""
    from sklearn.datasets import load_digits

    data = load_digits()
    ink = torch.from_numpy(data.images).float().div(16).unsqueeze(1)
    digit = torch.from_numpy(data.target).long()
    order = torch.randperm(len(digit), generator=torch.Generator().manual_seed(seed))
    rest, kept = order[held_out:], order[:held_out]
    return Scans(ink[rest], digit[rest]), Scans(ink[kept], digit[kept])


def _distorted(ink: Tensor, hand: Hand, generator: torch.Generator) -> Tensor:
    """ink [n, 1, 8, 8] -> tiles [n, TILE, TILE], each turned, slanted, scaled, shifted and bent by its own amount."""
    n = ink.shape[0]

    def vary(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    angle, slant = vary(n) * hand.turn, vary(n) * hand.slant
    width, height = ((1 + vary(n) * hand.size) * (DIGIT / TILE) for _ in range(2))
    cos, sin = angle.cos(), angle.sin()
    forward = torch.stack(
        [
            torch.stack([cos * width, (cos * slant - sin) * height], -1),
            torch.stack([sin * width, (sin * slant + cos) * height], -1),
        ],
        -2,
    )  # [n, 2, 2], rotation x slant x scale
    back = torch.linalg.inv(forward)  # grid_sample asks where each output pixel comes from
    shift = vary(n, 2) * (hand.shift * 2 / TILE)
    where = torch.cat([back, -(back @ shift[..., None])], -1)
    grid = F.affine_grid(where, [n, 1, TILE, TILE], align_corners=False)
    if hand.bend:
        field = F.interpolate(vary(n, 2, 4, 4) * hand.bend, size=(TILE, TILE), mode="bicubic", align_corners=True)
        grid = grid + field.permute(0, 2, 3, 1)
    return F.grid_sample(ink, grid, mode="bicubic", align_corners=False).clamp(0, 1).squeeze(1)


def draw(scans: Scans, count: int, hand: Hand, generator: torch.Generator) -> Pictures:
    """``count`` pictures of 3 to 5 random scans each, placed on two lines with jitter and noise."""
    number = torch.randint(MIN_DIGITS, MAX_DIGITS + 1, (count,), generator=generator)
    pick = torch.randint(len(scans.digit), (count, MAX_DIGITS), generator=generator)
    used = torch.arange(MAX_DIGITS) < number[:, None]
    tiles = _distorted(scans.ink[pick.flatten()], hand, generator).view(count, MAX_DIGITS, TILE, TILE)
    tiles = tiles * used[..., None, None]

    sheet = torch.zeros(count, PICTURE + 2 * TILE, PICTURE + 2 * TILE)  # margins catch what is drawn over the edge
    picture, window = torch.arange(count)[:, None, None], torch.arange(TILE)
    for k in range(MAX_DIGITS):
        centre_x = PICTURE / COLUMNS * (k % COLUMNS + 0.5)
        centre_y = PICTURE / ROWS * (k // COLUMNS + 0.5)
        jitter = (torch.rand(2, count, generator=generator) * 2 - 1) * hand.shift
        x = (TILE + centre_x - TILE / 2 + jitter[0]).round().long()
        y = (TILE + centre_y - TILE / 2 + jitter[1] * 1.5).round().long()  # lines are further apart than columns
        rows, columns = (y[:, None] + window)[:, :, None], (x[:, None] + window)[:, None, :]
        sheet[picture, rows, columns] = torch.maximum(sheet[picture, rows, columns], tiles[:, k])
    ink = sheet[:, TILE : TILE + PICTURE, TILE : TILE + PICTURE]
    ink = ink * (1 - hand.fade * torch.rand(count, 1, 1, generator=generator))
    ink = ink + hand.noise * torch.randn(ink.shape, generator=generator)
    return Pictures(ink.unsqueeze(1), scans.digit[pick].masked_fill(~used, -1))


def pixel_values(ink: Tensor) -> Tensor:
    """What the vision tower sees: ink with about zero mean and unit variance."""
    return (ink - 0.2) / 0.3


def words(ids: list[int]) -> str:
    """The digits among generated ids, up to the end of the answer."""
    answer = ids[: ids.index(END)] if END in ids else ids
    return "".join(WORDS[i] if i >= FIRST_DIGIT else "?" for i in answer)
