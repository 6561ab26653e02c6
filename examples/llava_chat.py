"""Chat with a picture through LLaVA over LLaMA.

A tiny model (CLIP tower, projector, grouped-query LLaMA on the fused kernels) learns on the spot to answer questions
about a coloured shape, is saved as a LLaVA checkpoint and loaded back; then it is asked about pictures it never saw.
Takes less than a minute on two cores.

    python examples/llava_chat.py
    python examples/llava_chat.py --ask                # type the questions: "what colour is it ?"
    python examples/llava_chat.py --save DIR           # keep the checkpoint; --load DIR chats with it again
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # waiting threads sleep soon: steady times beside other programs

import torch
from internvl_kernels.models.llava import (
    IGNORE_INDEX,
    LlavaConfig,
    LlavaLlamaForCausalLM,
    tokenizer_image_token,
)
from torch import Tensor
from transformers.utils import logging

SIDE = 24  # pixels
COLOURS = {"red": (0.9, 0.2, 0.2), "green": (0.2, 0.8, 0.3), "blue": (0.3, 0.4, 1.0), "yellow": (0.9, 0.9, 0.2)}
SHAPES = ("square", "disc", "cross")
PLACES = ("left", "right")
QUESTIONS = {"what colour is it ?": 0, "what shape is it ?": 1, "which side is it on ?": 2}
WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "USER:",
    "ASSISTANT:",
    "what",
    "which",
    "colour",
    "shape",
    "side",
    "is",
    "it",
    "on",
    "?",
]
WORDS += [*COLOURS, *SHAPES, *PLACES]


class Words:
    """A tokenizer whose tokens are words."""

    bos_token_id = 1

    def __call__(self, text: str) -> SimpleNamespace:
        unknown = [word for word in text.split() if word not in WORDS]
        if unknown:
            raise ValueError(f"the model does not know {unknown[0]!r}; its words are {', '.join(WORDS[5:])}")
        return SimpleNamespace(input_ids=[self.bos_token_id, *(WORDS.index(word) for word in text.split())])

    def decode(self, ids: list[int]) -> str:
        return " ".join(WORDS[i] for i in ids if i > 2)


def draw(colour: str, shape: str, place: str) -> Tensor:
    """A picture [3, SIDE, SIDE]: the shape in its colour on a dark, noisy ground."""
    radius = int(torch.randint(4, 6, ()))
    cx = int(torch.randint(radius, SIDE // 2 - radius + 2, ())) + (SIDE // 2 - 1 if place == "right" else 0)
    cy = int(torch.randint(radius, SIDE - radius, ()))
    y, x = torch.meshgrid(torch.arange(SIDE) - cy, torch.arange(SIDE) - cx, indexing="ij")
    inside = {
        "square": (x.abs() < radius) & (y.abs() < radius),
        "disc": x**2 + y**2 < radius**2,
        "cross": (torch.minimum(x.abs(), y.abs()) < 2) & (torch.maximum(x.abs(), y.abs()) < radius),
    }[shape]
    ink = torch.tensor(COLOURS[colour])[:, None, None]
    return torch.where(inside, ink, torch.tensor(0.1)) + 0.05 * torch.randn(3, SIDE, SIDE)


def pick() -> tuple[str, str, str]:
    """A random colour, shape and place."""
    choices = (list(COLOURS), SHAPES, PLACES)
    return tuple(options[int(torch.randint(len(options), ()))] for options in choices)


def prompt(question: str) -> str:
    return f"USER: <image> {question} ASSISTANT:"


def training_batch(tokenizer: Words, count: int) -> dict[str, Tensor]:
    """Questions of different lengths in one batch, padded on the right; labels cover the answers."""
    rows, images = [], []
    for _ in range(count):
        facts, question = pick(), list(QUESTIONS)[int(torch.randint(len(QUESTIONS), ()))]
        asked = tokenizer_image_token(prompt(question), tokenizer)
        answer = [WORDS.index(facts[QUESTIONS[question]]), WORDS.index("<eos>")]
        rows.append((asked + answer, [IGNORE_INDEX] * len(asked) + answer))
        images.append(draw(*facts))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORE_INDEX] * (longest - len(labels)) for _, labels in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels, "images": torch.stack(images)}


def make_model() -> LlavaLlamaForCausalLM:
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 6,  # 16 image tokens
    }
    config = LlavaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,  # the default, 0.02, suits thousands of channels, not 64
        mm_vision_config=tower,
        mm_vision_select_layer=-1,
        mm_projector_type="mlp2x_gelu",
        mm_tune_vision_tower=True,
        mm_prefix="prompt",  # image and question see all of each other
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlavaLlamaForCausalLM(config)


def train(model: LlavaLlamaForCausalLM, tokenizer: Words, steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    model.train()
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        loss = model(**training_batch(tokenizer, 64)).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step == steps or step % max(steps // 8, 1) == 0:
            print(
                f"step {step:4} of {steps}   loss {float(loss.detach()):.3f}   {time.perf_counter() - begin:4.0f} s",
                flush=True,
            )
    model.eval()


def show(picture: Tensor, colour: str) -> str:
    """The picture in text: two pixels of a row per character."""
    bright = picture.amax(0) > 0.5
    rows = [bright[y : y + 2].any(0) for y in range(0, SIDE, 2)]
    return "\n".join("    " + "".join("#" if dot else "." for dot in row.tolist()) for row in rows) + f"   ({colour})"


def answer(model: LlavaLlamaForCausalLM, tokenizer: Words, picture: Tensor, questions: list[str]) -> list[str]:
    """The answers to several questions in one batch: prompts of different lengths are padded on the left."""
    asked = [tokenizer_image_token(prompt(question), tokenizer) for question in questions]
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in asked])
    images = picture.expand(len(questions), -1, -1, -1)
    out = model.generate(ids, images=images, attention_mask=(ids != 0).long(), max_new_tokens=3, do_sample=False)
    return [tokenizer.decode(row) for row in out[:, longest:].tolist()]


def chat(model: LlavaLlamaForCausalLM, tokenizer: Words, pictures: int) -> None:
    right = total = 0
    for number in range(1, pictures + 1):
        facts = pick()
        picture = draw(*facts)
        print(f"\npicture {number}\n{show(picture, facts[0])}")
        for question, said in zip(QUESTIONS, answer(model, tokenizer, picture, list(QUESTIONS)), strict=True):
            right, total = right + (said == facts[QUESTIONS[question]]), total + 1
            print(f"  USER: {question:24} ASSISTANT: {said}")
    print(f"\n{right} of {total} answers are right")


def ask(model: LlavaLlamaForCausalLM, tokenizer: Words) -> None:
    facts = pick()
    picture = draw(*facts)
    print(f"\n{show(picture, facts[0])}\nask about it ({'; '.join(QUESTIONS)}); an empty line ends")
    while question := input("USER: ").strip():
        try:
            print(f"ASSISTANT: {answer(model, tokenizer, picture, [question])[0]}")
        except ValueError as error:
            print(error)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options]"
    )
    parser.add_argument("--steps", type=int, default=250, help="training steps (default 250)")
    parser.add_argument("--pictures", type=int, default=3, help="pictures to talk about (default 3)")
    parser.add_argument("--ask", action="store_true", help="type the questions yourself")
    parser.add_argument("--save", metavar="DIR", help="keep the checkpoint in this folder")
    parser.add_argument("--load", metavar="DIR", help="chat with a checkpoint that --save kept, without training")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures (default 0)")
    options = parser.parse_args()
    if options.steps < 1 or options.pictures < 1:
        parser.error("--steps and --pictures must be at least 1")
    logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    tokenizer = Words()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.load or options.save or scratch
        if options.load is None:
            model = make_model()
            print(f"training {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
            train(model, tokenizer, options.steps)
            model.save_pretrained(folder)
        model = LlavaLlamaForCausalLM.from_pretrained(folder).eval()
    print(f"loaded the checkpoint; attention: {model.config._attn_implementation!r}, the fused kernels")
    ask(model, tokenizer) if options.ask else chat(model, tokenizer, options.pictures)


if __name__ == "__main__":
    main()
