"""The short scripts run, at a size that takes seconds."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch, capsys, name, *arguments):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    module.main()
    return capsys.readouterr().out


def test_llava_chat_trains_saves_loads_and_answers(monkeypatch, capsys, tmp_path):
    out = run(monkeypatch, capsys, "llava_chat", "--steps", 2, "--pictures", 1, "--save", tmp_path)
    assert "attention: 'internvl'" in out and out.count("ASSISTANT:") == 3 and "of 3 answers are right" in out
    lines = iter(["what colour is it ?", "who is it ?", ""])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    out = run(monkeypatch, capsys, "llava_chat", "--load", tmp_path, "--ask")
    assert "step" not in out and out.count("ASSISTANT:") == 1 and "does not know 'who'" in out


def test_mpt_swap_attention_reports_equal_logits_and_times(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "mpt_swap_attention", "--tokens", 48, "--new", 2, "--rounds", 1)
    difference = float(out.split("largest difference of the logits: ")[1].split()[0])
    assert difference < 1e-3 and out.count(" ms") == 6
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, "mpt_swap_attention", "--tokens", 0)
    assert "--tokens is 0; it must be at least 1" in capsys.readouterr().err
