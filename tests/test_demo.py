"""The demo's machinery with a few training steps: what it writes, that it repeats, and its sentences on errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import internvl_kernels
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo_plots  # noqa: E402
import digit_pictures as dp  # noqa: E402
import read_digits  # noqa: E402
from muon import Muon, orthogonal  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run as a user would start it."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, str(EXAMPLES / "read_digits.py"), "--steps", "6", "--pictures", "30", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(internvl_kernels.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return out, done


def in_process(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["read_digits.py", *map(str, arguments)])
    read_digits.main()


def test_run_reports_and_writes(run):
    out, done = run
    assert re.search(r"^held-out exact match: \d+\.\d %$", done.stdout, re.MULTILINE)
    assert re.search(r"^training: 6 steps, [\d,]+ tokens/s", done.stdout, re.MULTILINE)
    assert re.search(r"^mask: prefix \(", done.stdout, re.MULTILINE)
    assert "internvl::prefix_attn x2" in done.stdout  # one call for each of the two layers
    assert "internvl::clip_qk_layernorm x2" in done.stdout
    assert "6/6" in done.stderr  # the progress bar
    for name in ("predictions.png", "loss_curve.png", "picture_1.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert (out / "checkpoint" / "model.safetensors").exists()


def test_a_saved_picture_is_read_back(run, monkeypatch, capsys):
    out, _ = run
    picture = out / "picture_1.png"
    in_process(monkeypatch, "--read", picture, "--checkpoint", out / "checkpoint")
    assert re.fullmatch(rf"{re.escape(str(picture))}: [0-9?]*\n", capsys.readouterr().out)


def test_errors_are_one_sentence(run, monkeypatch, tmp_path):
    out, _ = run
    with pytest.raises(SystemExit, match=r"no checkpoint in .*; run"):
        in_process(monkeypatch, "--read", out / "picture_1.png", "--checkpoint", tmp_path)
    for wrong in (out / "checkpoint" / "config.json", tmp_path / "missing.png", tmp_path):
        with pytest.raises(SystemExit, match="not an image file that can be read"):
            in_process(monkeypatch, "--read", wrong, "--checkpoint", out / "checkpoint")


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--steps", "many"), ("--mask", "full")])
def test_wrong_arguments_are_refused(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, *arguments)
    assert stop.value.code == 2 and arguments[0] in capsys.readouterr().err


def short_training(mask, seed=0, steps=3):
    torch.manual_seed(seed)
    model = read_digits.build_model(mask)
    return read_digits.train(model, dp.load_scans(seed)[0], steps, seed)[0], model


def test_training_repeats_bit_for_bit():
    first, model = short_training("prefix")
    second, other = short_training("prefix")
    assert first == second
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert short_training("prefix", seed=1)[0] != first
    assert short_training("causal")[0] != first


def test_no_scan_is_in_both_parts():
    train, held_out = dp.load_scans(0)
    assert (len(train.digit), len(held_out.digit)) == (1497, 300)
    known = {scan.numpy().tobytes() for scan in train.ink}
    assert len({scan.numpy().tobytes() for scan in held_out.ink} & known) == 0


def test_a_picture_shows_its_digits_in_reading_order():
    """A still hand draws each scan centred in its cell, so cells can be compared with the scans themselves."""
    scans = dp.load_scans(0)[0]
    still = dp.Hand(turn=0, slant=0, size=0, shift=0, bend=0, fade=0, noise=0)
    pictures = dp.draw(scans, 40, still, torch.Generator().manual_seed(0))
    means = torch.stack([scans.ink[scans.digit == d].mean(0) for d in range(10)]).flatten(1)  # [10, 64]
    right = total = 0
    for ink, digits in zip(pictures.ink, pictures.digits.tolist(), strict=True):
        for k, digit in enumerate(digits):
            y, x = (k // 3) * 24 + 4, (k % 3) * 16
            cell = torch.nn.functional.avg_pool2d(ink[:, y : y + 16, x : x + 16], 2).flatten()
            if digit < 0:
                assert cell.mean() < 0.05  # a neighbour's edge may reach in; a digit has 0.3
            else:
                total += 1
                right += int(((means - cell) ** 2).sum(1).argmin()) == digit
    assert right / total > 0.85  # nearest class mean; chance is 0.1


def test_labels_cover_the_answer_and_its_end():
    pictures = dp.draw(dp.load_scans(0)[1], 8, dp.READING_HAND, torch.Generator().manual_seed(0))
    batch = read_digits.training_batch(pictures)
    for row, mask, labels, text in zip(
        batch["input_ids"].tolist(), batch["attention_mask"], batch["labels"].tolist(), pictures.texts(), strict=True
    ):
        answer = [label for label in labels if label != -100]
        assert dp.words(answer) == text and answer[-1] == dp.END
        assert labels[:6] == [-100] * 6 and row[6 : 6 + len(answer)] == answer
        assert mask.sum() == 6 + len(answer)


def test_picture_files_come_back(tmp_path):
    ink = dp.draw(dp.load_scans(0)[1], 1, dp.READING_HAND, torch.Generator().manual_seed(0)).ink[0]
    demo_plots.save_picture(tmp_path / "a.png", ink)
    torch.testing.assert_close(
        demo_plots.load_picture(tmp_path / "a.png", dp.PICTURE)[0], ink.clamp(0, 1), atol=0.003, rtol=0
    )


def test_orthogonal_updates_and_the_transpose():
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonal(torch.randn(3, 8, 20)))
    assert singular.min() > 0.6 and singular.max() < 1.3
    tall, wide = torch.nn.Parameter(torch.zeros(20, 8)), torch.nn.Parameter(torch.zeros(8, 20))
    tall.grad = torch.randn(20, 8)
    wide.grad = tall.grad.T.clone()
    Muon([tall, wide], lr=0.1).step()
    torch.testing.assert_close(tall.detach(), wide.detach().T)
    assert tall.abs().max() > 0
