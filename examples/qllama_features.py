"""Image-text features of InternVL-14B's model, made small and trained on the spot.

A vision transformer reads pictures of discs on coloured grounds, the query tokens of a Q-LLaMA read the vision
transformer, and the same Q-LLaMA reads captions. A contrastive loss pulls the two features together; then a table shows
how similar each new picture is to each caption. Takes less than a minute on two cores.

    python examples/qllama_features.py
    python examples/qllama_features.py --steps 200 --save /tmp/qllama    # keep the checkpoint
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from internvl_kernels.models.internvl_14b import InternVLConfig, InternVLModel
from torch.nn import functional

COLOURS = {"red": (0.9, 0.2, 0.2), "green": (0.2, 0.8, 0.3), "blue": (0.25, 0.35, 0.9)}
CAPTIONS = [(front, "on", back) for front, back in itertools.permutations(COLOURS, 2)]
WORDS = ["<pad>", "on", *COLOURS]
SIDE = 24  # pixels


def make_model() -> InternVLModel:
    """A model of the real one's classes, a ten-thousandth of its size."""
    config = InternVLConfig(
        vision_config={
            "hidden_size": 48,
            "num_attention_heads": 3,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "patch_size": 4,
            "image_size": SIDE,
            "initializer_range": 0.1,  # the defaults suit thousands of channels, not tens
            "initializer_factor": 1.0,
        },
        qllama_config={
            "vocab_size": len(WORDS),
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.1,
            "pad_token_id": 0,
        },
        num_query_token=4,
    )
    model = InternVLModel(config)
    torch.nn.init.normal_(model.query_tokens, std=0.5)  # zeros, the model's own start, would make all queries alike
    return model


def draw(front: str, back: str) -> torch.Tensor:
    """A picture [3, SIDE, SIDE] of a disc somewhere on a ground of another colour, with noise."""
    radius = int(torch.randint(4, 8, ()))
    cx, cy = (int(torch.randint(radius, SIDE - radius, ())) for _ in range(2))
    y, x = torch.meshgrid(torch.arange(SIDE) - cy, torch.arange(SIDE) - cx, indexing="ij")
    colours = [torch.tensor(COLOURS[name])[:, None, None] for name in (front, back)]
    return torch.where(x**2 + y**2 < radius**2, *colours) + 0.1 * torch.randn(3, SIDE, SIDE)


def pictures(rounds: int) -> torch.Tensor:
    """[rounds * 6, 3, SIDE, SIDE], in the order of CAPTIONS."""
    return torch.stack([draw(front, back) for _ in range(rounds) for front, _on, back in CAPTIONS])


def caption_ids() -> torch.Tensor:
    return torch.tensor([[WORDS.index(word) for word in caption] for caption in CAPTIONS])


def image_features(model: InternVLModel, images: torch.Tensor) -> torch.Tensor:
    """[n, width]: the mean of the query states, of length 1."""
    return functional.normalize(model.get_image_features(images)[1].mean(1), dim=-1)


def text_features(model: InternVLModel, ids: torch.Tensor) -> torch.Tensor:
    """[n, width]: the state of the last word, of length 1."""
    return functional.normalize(model.get_text_features(ids)[:, -1], dim=-1)


def train(model: InternVLModel, steps: int) -> None:
    """Contrastive training: each picture is nearest to its caption."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    ids, target = caption_ids(), torch.arange(len(CAPTIONS)).repeat(4)
    began = time.perf_counter()
    for step in range(steps):
        similarity = image_features(model, pictures(4)) @ text_features(model, ids).T
        loss = functional.cross_entropy(similarity / 0.1, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(steps // 6, 1) == 0 or step == steps - 1:
            print(f"  step {step + 1:4d}  loss {loss.item():.3f}  {time.perf_counter() - began:5.1f} s")


@torch.no_grad()
def report(model: InternVLModel, rounds: int = 20) -> float:
    """Print one round's similarities and the share of ``rounds`` new rounds whose caption was found."""
    model.eval()
    texts = text_features(model, caption_ids())
    names = [" ".join(caption) for caption in CAPTIONS]
    print("\nsimilarity of new pictures (rows) to captions (columns); [ ] marks the nearest caption")
    print(" " * 14 + "".join(f"{name:>14}" for name in names))
    for name, row in zip(names, image_features(model, pictures(1)) @ texts.T, strict=True):
        best = int(row.argmax())
        cells = (f"[{value:5.2f}]" if i == best else f"{value:6.2f} " for i, value in enumerate(row.tolist()))
        print(f"{name:<14}" + "".join(f"{cell:>14}" for cell in cells))
    found = (image_features(model, pictures(rounds)) @ texts.T).argmax(1)
    share = float((found == torch.arange(len(CAPTIONS)).repeat(rounds)).float().mean())
    print(f"\nthe right caption was nearest for {share:.1%} of {len(found)} new pictures")
    return share


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="training steps of 24 pictures (default: 80)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="FOLDER", help="write the checkpoint there and read it back")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    model = make_model()
    count = sum(p.numel() for p in model.parameters())
    print(f"InternVLModel: {count:,} parameters, {model.num_query_token} query tokens, {model.num_patches} patches")
    train(model, options.steps)
    if options.save:
        model.save_pretrained(options.save)
        model = InternVLModel.from_pretrained(options.save)
    return report(model)


if __name__ == "__main__":
    main()
