"""examples/prefix_lm_finetune.py: the task, and a run of a few steps from end to end."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "prefix_lm_finetune.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("prefix_lm_finetune", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_answers_count_the_letters(example):
    for pair in example.make_pairs(20, 7, seed=3):
        letters = pair["prompt"][:-1].tolist()
        assert pair["prompt"][-1] == example.END_OF_PROMPT and max(letters) < example.ALPHABET
        assert (pair["answer"] - example.FIRST_COUNT).tolist() == [letters.count(letter) for letter in letters]


def test_both_models_start_from_the_same_weights(example):
    one, two = example.build_model(5), example.build_model(5)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("trainer", [True, False])
def test_a_few_steps_from_end_to_end(example, trainer, tmp_path, capsys, monkeypatch):
    if trainer and not importlib.util.find_spec("accelerate"):
        pytest.skip("the Trainer of transformers needs accelerate (pip install accelerate)")
    if not trainer:
        monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    assert example.main(["--letters", "4", "--steps", "3", "--pairs", "64", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "causal: loss" in printed and "prefix: loss" in printed
    assert (tmp_path / "causal_and_prefix.png").stat().st_size > 5000
    assert ("plain loop" in printed) == (not trainer)


def test_options_are_checked(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--letters", "0"])
    assert "at least 1" in capsys.readouterr().err
