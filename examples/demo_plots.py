"""The demo's pictures: what was read, the loss curve, and single pictures to and from files."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

INK, RIGHT, WRONG, SOFT = "#1f2a44", "#2a7f62", "#c0392b", "#9aa3b5"


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK})
    return plt


def save_predictions(path: Path, ink: Tensor, truth: list[str], read: list[str], title: str) -> None:
    """A sheet of pictures, each with what the model read; a wrong answer shows the right one beside it.

    Args:
        ink: [n, 1, H, W]; truth, read: n strings. The first 24 are shown.
    """
    plt = _pyplot()
    rows, columns = 3, 8
    figure, axes = plt.subplots(rows, columns, figsize=(10.4, 5.2))
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, wanted, found in zip(axes.flat, ink, truth, read, strict=False):
        axis.imshow(1 - picture[0].clamp(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
        right = wanted == found
        label = found or "nothing"
        axis.set_title(label if right else f"{label}, not {wanted}", color=RIGHT if right else WRONG, fontsize=9.5)
    figure.suptitle(title, fontsize=13, color=INK)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.86, bottom=0.01, wspace=0.08, hspace=0.26)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def save_loss_curve(path: Path, losses: list[float], title: str) -> None:
    """Loss of every step, and its running mean."""
    plt = _pyplot()
    values = torch.tensor(losses)
    width = max(1, min(25, len(losses) // 10))
    mean = F.avg_pool1d(values[None, None], width, stride=1).flatten()
    figure, axis = plt.subplots(figsize=(7, 3.6))
    axis.plot(range(1, len(losses) + 1), losses, color=SOFT, linewidth=0.6, label="one step")
    axis.plot(range(width, len(losses) + 1), mean, color=INK, linewidth=1.8, label=f"mean of {width} steps")
    axis.set(xlabel="training step", ylabel="loss (nats per answer token)", yscale="log")
    axis.set_title(title, fontsize=12, color=INK)
    axis.grid(True, which="major", color="#e6e9f0")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def save_picture(path: Path, ink: Tensor) -> None:
    """ink [1, H, W] as an 8-bit grey PNG, dark on light, four times as large so that a viewer shows it well."""
    from PIL import Image

    grey = (255 * (1 - ink[0].clamp(0, 1))).round().to(torch.uint8)
    grey = grey.repeat_interleave(4, 0).repeat_interleave(4, 1)
    Image.fromarray(grey.numpy()).save(path)


def load_picture(path: Path, size: int) -> Tensor:
    """An image file as ink [1, 1, size, size]: grey, scaled, and turned to light-on-dark when it is dark-on-light.

    Raises: OSError when the file is missing or not an image.
    """
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        grey = image.convert("L").resize((size, size), Image.Resampling.BOX if image.width > size else None)
    ink = torch.from_numpy(numpy.asarray(grey, dtype=numpy.float32) / 255)
    if ink.median() > 0.5:
        ink = 1 - ink
    return ink[None, None]
