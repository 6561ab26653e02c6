"""A small vision-language model learns to read handwriting on the CPU, in a few minutes.

Real scans of handwritten digits (scikit-learn) are laid out as pictures of several digits. A CLIP vision tower, a
projector and a prefix-LM MPT (ALiBi, QK LayerNorm, clipped QKV, on the compiled kernels) learn to answer
"read the digits :"; then the model reads pictures made of scans that it has never seen.

    python examples/read_digits.py
    python examples/read_digits.py --read demo-output/picture_1.png
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

# Read when torch loads. By default threads spin for long while they wait, which makes a step 20 times slower as soon as
# another program wants one of the cores (two runs on two cores: 4.1 s a step); a short spin costs nothing (0.34 s).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import demo_plots
import digit_pictures as dp
import torch
from muon import Muon
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BATCH = 64
WARMUP = 60  # steps
LEARNING_RATE = 3e-3


def build_model(mask: str):
    """The untrained model; ``mask`` is 'prefix' or 'causal' and is all that differs between the two."""
    from internvl_kernels.models.llava import LlavaMptPrefixConfig, LlavaMptPrefixForCausalLM

    width = 96
    tower = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": dp.PICTURE,
        "patch_size": 8,  # 36 image tokens
        "num_channels": 1,
        "hidden_act": "gelu",
    }
    config = LlavaMptPrefixConfig(
        d_model=width,
        n_heads=4,
        n_layers=2,
        expansion_ratio=3,
        max_seq_len=64,
        vocab_size=len(dp.WORDS),
        attn_config={
            "prefix_lm": mask == "prefix",
            "alibi": True,
            "qk_ln": True,
            "clip_qkv": 6.0,
            "attn_impl": "triton",  # the fused kernels: compiled C++ on the CPU, Triton on a GPU
        },
        init_config={"name": "small_init_"},  # leaves the first plateau about 60 steps earlier than MPT's default
        mm_vision_config=tower,
        mm_vision_select_layer=-1,
        mm_projector_type="mlp2x_gelu",
        mm_tune_vision_tower=True,
        pad_token_id=dp.PAD,
        bos_token_id=dp.START,
        eos_token_id=dp.END,
    )
    return LlavaMptPrefixForCausalLM(config)


def prompts(count: int) -> Tensor:
    """[count, P] int64: start, the image, the question."""
    from internvl_kernels.models.llava import IMAGE_TOKEN_INDEX

    return torch.tensor([[dp.START, IMAGE_TOKEN_INDEX, *dp.QUESTION]]).expand(count, -1)


def training_batch(pictures: dp.Pictures) -> dict[str, Tensor]:
    """Prompt and answer as model inputs; labels cover the answer and its end."""
    from internvl_kernels.models.llava import IGNORE_INDEX

    count, prompt = len(pictures.digits), prompts(len(pictures.digits))
    answer = torch.full((count, dp.MAX_DIGITS + 1), dp.PAD)
    real = pictures.digits >= 0
    answer[:, :-1] = torch.where(real, pictures.digits + dp.FIRST_DIGIT, dp.PAD)
    answer[torch.arange(count), real.sum(1)] = dp.END
    ignored = torch.full_like(prompt, IGNORE_INDEX)
    return {
        "input_ids": torch.cat([prompt, answer], 1),
        "attention_mask": torch.cat([torch.ones_like(prompt), (answer != dp.PAD).long()], 1),
        "labels": torch.cat([ignored, answer.masked_fill(answer == dp.PAD, IGNORE_INDEX)], 1),
        "images": dp.pixel_values(pictures.ink),
    }


def optimisers(model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden states, AdamW for embeddings, norms and biases."""
    tables = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    tables.add(id(model.get_input_embeddings().weight))
    matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in tables]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=LEARNING_RATE, weight_decay=0.05),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
    ]


def train(model, scans: dp.Scans, steps: int, seed: int) -> tuple[list[float], float]:
    """Loss of each step, and the text and image tokens trained on per second."""
    from tqdm import tqdm

    model.train()
    generator = torch.Generator().manual_seed(seed)
    both = optimisers(model)
    losses, tokens, begun = [], 0, time.perf_counter()
    interval = 0.2 if sys.stderr.isatty() else 15  # seconds; a log file needs few lines
    with tqdm(total=steps, desc="training", unit="step", mininterval=interval) as bar:
        for step in range(steps):
            rate = LEARNING_RATE * min(1, (step + 1) / WARMUP) * (0.505 + 0.495 * math.cos(math.pi * step / steps))
            for optimiser in both:
                for group in optimiser.param_groups:
                    group["lr"] = rate
                optimiser.zero_grad()
            batch = training_batch(dp.draw(scans, BATCH, dp.TRAINING_HAND, generator))
            output = model(**batch)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in both:
                optimiser.step()
            losses.append(output.loss.item())
            tokens += output.logits.shape[0] * output.logits.shape[1]
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {tokens / (time.perf_counter() - begun):,.0f} tokens/s", False)
            bar.update()
    return losses, tokens / (time.perf_counter() - begun)


def read(model, ink: Tensor) -> list[str]:
    """ink [n, 1, PICTURE, PICTURE] -> the digits that ``generate`` answers, greedily, over a cache."""
    model.eval()
    answers = []
    for part in ink.split(100):
        prompt = prompts(len(part))
        out = model.generate(
            prompt,
            images=dp.pixel_values(part),
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=dp.MAX_DIGITS + 1,
            do_sample=False,
        )
        answers += [dp.words(ids) for ids in out[:, prompt.shape[1] :].tolist()]
    return answers


class OperatorCalls(TorchDispatchMode):
    """Counts the package's operators that PyTorch's dispatcher really runs, forward and backward."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "internvl":
            self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def kernels_used(model, scans: dp.Scans) -> str:
    """The backend, and the package's operators that one more training step calls."""
    from internvl_kernels import registration, variables

    model.train()
    batch = training_batch(dp.draw(scans, BATCH, dp.TRAINING_HAND, torch.Generator().manual_seed(0)))
    with OperatorCalls() as calls:
        model(**batch).loss.backward()
    model.zero_grad()
    backend = variables.default_backend() or ("cpu" if registration.LIBRARY_ERROR is None else "none")
    isa = registration.cpu_info().get("isa", "no compiled kernels")
    counts = ", ".join(f"{name} x{count}" for name, count in calls.count.items())
    return f"backend {backend}, {isa}, {torch.get_num_threads()} threads; one step calls {counts or 'none of them'}"


def demonstrate(options: argparse.Namespace) -> None:
    begun = time.perf_counter()
    torch.manual_seed(options.seed)
    scans, held_out = dp.load_scans(options.seed)
    print(f"{len(scans.digit)} scans to learn from, {len(held_out.digit)} held out; seed {options.seed}")
    meaning = {
        "prefix": "image and question see all of each other, the answer is causal",
        "causal": "every position sees only earlier ones; nothing else is different",
    }
    print(f"mask: {options.mask} ({meaning[options.mask]})")
    model = build_model(options.mask)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")
    losses, rate = train(model, scans, options.steps, options.seed)
    print(f"training: {options.steps} steps, {rate:,.0f} tokens/s (text and image)")
    print(f"kernels: {kernels_used(model, scans)}")

    generator = torch.Generator().manual_seed(options.seed + 1)
    pictures = dp.draw(held_out, options.pictures, dp.READING_HAND, generator)
    truth, answers = pictures.texts(), read(model, pictures.ink)
    exact = 100 * sum(a == b for a, b in zip(truth, answers, strict=True)) / len(truth)
    pairs = [(a, b) for t, r in zip(truth, answers, strict=True) for a, b in zip(t, r.ljust(len(t)), strict=False)]
    print(f"held-out digits: {100 * sum(a == b for a, b in pairs) / len(pairs):.1f} %")
    print(f"held-out exact match: {exact:.1f} %")

    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    title = f"Read from scans never seen in training: {exact:.1f} % of {len(truth)} pictures right"
    demo_plots.save_predictions(out / "predictions.png", pictures.ink, truth, answers, title)
    demo_plots.save_loss_curve(out / "loss_curve.png", losses, f"Learning to read, {options.mask} mask")
    model.save_pretrained(out / "checkpoint")
    demo_plots.save_picture(out / "picture_1.png", pictures.ink[0])
    print(f"wrote {out}/predictions.png, loss_curve.png, picture_1.png ({truth[0]}) and checkpoint/")
    print(f"total: {time.perf_counter() - begun:.0f} s")
    print(f"next: python examples/read_digits.py --read {out}/picture_1.png --checkpoint {out}/checkpoint")


def read_file(picture: Path, checkpoint: Path) -> None:
    from internvl_kernels.models.llava import LlavaMptPrefixForCausalLM

    if not (checkpoint / "config.json").is_file():
        raise SystemExit(f"read_digits: no checkpoint in {checkpoint}; run `python examples/read_digits.py` first")
    try:
        ink = demo_plots.load_picture(picture, dp.PICTURE)
    except OSError as error:
        raise SystemExit(f"read_digits: {picture} is not an image file that can be read ({error})") from None
    model = LlavaMptPrefixForCausalLM.from_pretrained(checkpoint)
    print(f"{picture}: {read(model, ink)[0]}")


def main() -> None:
    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--read", type=Path, metavar="IMAGE", help="read one image file with a saved model; no training")
    add("--checkpoint", type=Path, help="model for --read (default: OUT/checkpoint)")
    add("--out", type=Path, default=Path("demo-output"), help="folder for results (default: %(default)s)")
    add("--mask", choices=("prefix", "causal"), default="prefix", help="attention mask (default: %(default)s)")
    add("--steps", type=positive, default=1100, help="training steps (default: %(default)s)")
    add("--pictures", type=positive, default=1000, help="held-out pictures to read (default: %(default)s)")
    add("--seed", type=int, default=0, help="split, pictures, initial weights (default: %(default)s)")
    options = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading and writing files; training has its own
    try:
        if options.read is not None:
            read_file(options.read, options.checkpoint or options.out / "checkpoint")
        else:
            demonstrate(options)
    except ModuleNotFoundError as error:
        raise SystemExit(f"read_digits: {error.name} is missing; run `make demo` or install the extra 'demo'") from None


if __name__ == "__main__":
    main()
