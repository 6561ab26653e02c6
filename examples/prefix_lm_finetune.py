"""Train a small GPT-NeoX on prompt -> answer pairs, once causal and once as a prefix LM, side by side.

The prompt is a row of letters, and for each letter in turn the answer tells how often it occurs in the prompt. A
causal model has read only half of a prompt when it represents the letter in its middle; as a prefix LM the same model,
converted by one call, sees all of it. Both start from the same weights and see the same pairs.

    python examples/prefix_lm_finetune.py
    python examples/prefix_lm_finetune.py --letters 8 --steps 600

Training runs in the Trainer of transformers where accelerate is installed, else in a loop of a few lines.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # read when torch loads; see read_digits.py

import torch
from internvl_kernels.models.prefix_lm import PrefixLMCollator, convert_hf_causal_lm_to_prefix_lm
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

ALPHABET = 4
PAD, END_OF_PROMPT = ALPHABET, ALPHABET + 1
FIRST_COUNT = ALPHABET + 1  # so that ALPHABET + 2 means "once"
BATCH, LEARNING_RATE = 64, 4e-3


def make_pairs(count: int, letters: int, seed: int) -> list[dict[str, Tensor]]:
    """``count`` pairs: ``letters`` random letters and the end of the prompt; one count for each letter."""
    rows = torch.randint(0, ALPHABET, (count, letters), generator=torch.Generator().manual_seed(seed))
    counts = (rows[:, None, :] == rows[:, :, None]).sum(-1)
    prompts = torch.cat([rows, torch.full((count, 1), END_OF_PROMPT)], 1)
    return [{"prompt": p, "answer": FIRST_COUNT + a} for p, a in zip(prompts, counts, strict=True)]


def build_model(letters: int) -> GPTNeoXForCausalLM:
    set_seed(0)
    config = GPTNeoXConfig(
        vocab_size=FIRST_COUNT + letters + 1,
        max_position_embeddings=2 * letters + 1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        rotary_pct=1.0,
        use_parallel_residual=False,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return GPTNeoXForCausalLM(config)


class CausalCollator(PrefixLMCollator):
    """The same batches without the mask that opens the prompt."""

    def __call__(self, examples):
        batch = super().__call__(examples)
        del batch["bidirectional_mask"]
        return batch


class Record(TrainerCallback):
    """Keeps the loss of every step."""

    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])


def train(model: GPTNeoXForCausalLM, pairs, collator, steps: int, folder: Path) -> list[float]:
    """Losses of ``steps`` steps."""
    if importlib.util.find_spec("accelerate"):
        record = Record()
        arguments = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=LEARNING_RATE,
            warmup_steps=steps // 10, lr_scheduler_type="cosine", logging_steps=1, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, remove_unused_columns=False, seed=1,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=pairs, data_collator=collator, callbacks=[record])
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return record.losses
    print("accelerate is not installed: training in a plain loop")
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.1)
    order, losses = torch.Generator().manual_seed(1), []
    model.train()
    for _ in range(steps):
        picked = torch.randint(len(pairs), (BATCH,), generator=order)
        loss = model(**collator([pairs[i] for i in picked])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@torch.no_grad()
def answer(model: GPTNeoXForCausalLM, pairs) -> Tensor:
    """The tokens that ``generate`` gives for the prompts, [n, letters]."""
    prompts = torch.stack([pair["prompt"] for pair in pairs])
    length = pairs[0]["answer"].shape[0]
    mask = torch.ones_like(prompts)
    out = model.eval().generate(prompts, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=PAD)
    return out[:, prompts.shape[1] :]


def save_plot(path: Path, losses: dict[str, list[float]], right: dict[str, float]) -> None:
    """Loss curves on the left, counts that are right on held-out prompts on the right."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    colours = {"causal": "#9aa3b5", "prefix": "#2a7f62"}
    figure, (curve, bars) = plt.subplots(1, 2, figsize=(9.2, 3.6), width_ratios=[2.4, 1])
    for name, values in losses.items():
        width = min(20, len(values))
        mean = torch.tensor(values).unfold(0, width, 1).mean(-1)
        curve.plot(range(width, len(values) + 1), mean, color=colours[name], linewidth=1.8, label=name)
    curve.set(xlabel="training step", ylabel="loss (nats per answer token)", title="the same GPT-NeoX, the same pairs")
    curve.set_ylim(bottom=0)
    curve.legend(frameon=False)
    drawn = bars.bar(list(right), [100 * value for value in right.values()], color=[colours[name] for name in right])
    bars.bar_label(drawn, fmt="%.0f %%", padding=2)
    bars.set(ylabel="right counts, held-out prompts (%)", ylim=(0, 110), title="generate")
    for axis in (curve, bars):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--letters", type=int, default=6, help="length of a prompt")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each model")
    parser.add_argument("--pairs", type=int, default=20000, help="training pairs")
    parser.add_argument("--out", type=Path, default=Path("prefix-lm-output"), help="folder of the plot")
    options = parser.parse_args(arguments)
    if min(options.letters, options.steps, options.pairs) < 1:
        parser.error("--letters, --steps and --pairs are at least 1")
    options.out.mkdir(parents=True, exist_ok=True)

    pairs = make_pairs(options.pairs, options.letters, seed=0)
    held_out = make_pairs(500, options.letters, seed=1)
    wanted = torch.stack([pair["answer"] for pair in held_out])
    losses, right = {}, {}
    for name in ("causal", "prefix"):
        model = build_model(options.letters)
        collator = CausalCollator(pad_token_id=PAD)
        if name == "prefix":
            model, collator = convert_hf_causal_lm_to_prefix_lm(model), PrefixLMCollator(pad_token_id=PAD)
        start = time.perf_counter()
        losses[name] = train(model, pairs, collator, options.steps, options.out)
        seconds = time.perf_counter() - start
        found = answer(model, held_out)
        right[name] = float((found == wanted).float().mean())
        whole = float((found == wanted).all(1).float().mean())
        print(
            f"{name}: loss {sum(losses[name][-20:]) / len(losses[name][-20:]):.3f} after {options.steps} steps "
            f"({seconds:.0f} s); held-out counts right {right[name]:.1%}, whole answers {whole:.1%}"
        )
        letters = "".join(chr(ord("a") + int(t)) for t in held_out[0]["prompt"][:-1])
        print(f"        {letters} -> {(found[0] - FIRST_COUNT).tolist()}   right: {(wanted[0] - FIRST_COUNT).tolist()}")
    save_plot(options.out / "causal_and_prefix.png", losses, right)
    print(f"plot: {options.out / 'causal_and_prefix.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
