"""Swap the attention of an MPT checkpoint while it is loaded, and time what changes.

The same weights run with MPT's own eager arithmetic ('torch') and with the fused kernels: a prompt, a training step,
and tokens generated after the prompt. Without --checkpoint a small prefix-LM MPT is made, saved and loaded on the spot.

    python examples/mpt_swap_attention.py
    python examples/mpt_swap_attention.py --checkpoint DIR   # of MPTForCausalLM, or of transformers' MptForCausalLM
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # waiting threads sleep soon: steady times beside other programs

import torch
from internvl_kernels.models.mpt import MPTConfig, MPTForCausalLM
from transformers.utils import logging

IMPLEMENTATIONS = {"torch": "torch: eager, S x S", "triton": "triton: fused kernels"}


def make_checkpoint(folder: str, tokens: int) -> None:
    """A random MPT with everything that its attention can have: ALiBi, QK LayerNorm, clipped QKV, a prefix."""
    attn = {"alibi": True, "qk_ln": True, "clip_qkv": 6.0, "prefix_lm": True}
    config = MPTConfig(d_model=512, n_heads=8, n_layers=2, max_seq_len=tokens + 64, vocab_size=1000, attn_config=attn)
    MPTForCausalLM(config).save_pretrained(folder)


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def jobs(model: MPTForCausalLM, tokens: int, new: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    mask = torch.ones_like(ids)
    prefix = (
        {"prefix_mask": (torch.arange(tokens) < tokens // 2)[None]} if model.config.attn_config["prefix_lm"] else {}
    )

    def prompt():
        with torch.no_grad():
            return model(ids, attention_mask=mask, **prefix).logits

    def train():
        model.zero_grad(set_to_none=True)
        model(ids, attention_mask=mask, labels=ids, use_cache=False, **prefix).loss.backward()

    def generate():
        return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)

    return {
        f"prompt of {tokens} tokens": prompt,
        "training step": train,
        f"prompt and {new} new tokens": generate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", metavar="DIR", help="an MPT checkpoint; default: one made on the spot")
    parser.add_argument("--tokens", type=int, default=1024, help="length of the prompt (default 1024)")
    parser.add_argument("--new", type=int, default=16, help="tokens to generate (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; the median counts (default 3)")
    options = parser.parse_args()
    for name in ("tokens", "new", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        folder = options.checkpoint or made
        if options.checkpoint is None:
            print(
                "making an MPT checkpoint: 2 layers, width 512, ALiBi, QK LayerNorm, clipped QKV, prefix LM", flush=True
            )
            make_checkpoint(made, options.tokens)
        model = MPTForCausalLM.from_pretrained(folder).eval()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"loaded {size:.1f} million parameters, {torch.get_num_threads()} threads\n")

    work, outputs, times = jobs(model, options.tokens, options.new), {}, {}
    for name in IMPLEMENTATIONS:  # also warms up
        model.set_attn_impl(name)  # the whole swap: weights and configuration stay as they are
        outputs[name] = next(iter(work.values()))()
    difference = float((outputs["torch"] - outputs["triton"]).abs().max())
    print(
        f"largest difference of the logits: {difference:.1e} (logits up to {float(outputs['torch'].abs().max()):.1f})\n"
    )

    print(f"{'':32}" + "".join(f"{label:>26}" for label in IMPLEMENTATIONS.values()) + f"{'ratio':>10}")
    for job, run in work.items():
        times = {name: [] for name in IMPLEMENTATIONS}
        for _ in range(options.rounds):
            for name in IMPLEMENTATIONS:
                model.set_attn_impl(name)
                times[name].append(timed(run))
        eager, fused = (statistics.median(times[name]) for name in IMPLEMENTATIONS)
        print(f"{job:32}{eager:23.0f} ms{fused:23.0f} ms{eager / fused:9.1f}x", flush=True)


if __name__ == "__main__":
    main()
