"""The tests' own measure: a wrong result is noticed, a case reruns from its text."""

import pytest
import torch
from internvl_kernels import reference
from internvl_kernels.testing import Case, attention_bounds, build, gate, mismatches, oracle, random_case, run
from internvl_kernels.testing.__main__ import main, parse_case

CASE = Case(2, 40, 70, 4, 2, 16, prefix_len=(20, 0), alibi="mpt")


def complaints(case, change):
    inputs = build(case)
    truth = oracle(inputs)
    results = {name: t.clone() for name, t in truth.items()}
    change(results)
    return mismatches(results, truth, attention_bounds(inputs, truth))


def test_the_truth_passes():
    assert not complaints(CASE, lambda results: None)


SENSITIVITY = {"out": 1e-5, "lse": 1e-5, "dv": 1e-4, "dq": 1e-3, "dk": 1e-3, "dalibi_slopes": 1e-2}


@pytest.mark.parametrize("change", ("slightly", "sign"))
@pytest.mark.parametrize("name", SENSITIVITY)
def test_one_wrong_element(name, change):
    """The largest element of a result, off by this much in fp32, is named with its place.

    dq, dk and the slopes' gradient are sums in which terms of both signs cancel; their bounds are coarser.
    """

    def spoil(results):
        flat = results[name].view(-1)
        flat[flat.abs().argmax()] *= 1 + SENSITIVITY[name] if change == "slightly" else -1

    (problem,) = complaints(CASE, spoil)
    assert problem.startswith(f"{name}: 1 of ") and "expected" in problem


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_non_finite_elements(value):
    def spoil(results):
        results["out"][1, 3, 2, 5] = value

    (problem,) = complaints(CASE, spoil)
    assert "out: [1, 3, 2, 5] is " in problem


def test_empty_rows_must_be_minus_infinity():
    case = Case(1, 4, 4, 1, 1, 8, key_range=((2, 4),))
    assert not complaints(case, lambda results: None)
    (problem,) = complaints(case, lambda results: results["lse"][0, 0, :2].fill_(0))
    assert problem == "lse: [0, 0, 0] is 0, expected -inf and 1 more not finite alike"


def test_wrong_shape():
    (problem,) = complaints(CASE, lambda results: results.update(out=results["out"][:, 1:]))
    assert problem == "out: shape [2, 39, 4, 16], expected [2, 40, 4, 16]"


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_eager_grants_itself(dtype):
    """Eager attention passes with its own error granted; in 16 bits it does not pass on the bounds alone."""
    case = Case(1, 60, 60, 2, 2, 64, dtype, softmax_scale=1.0)
    inputs = build(case)
    truth, eager = oracle(inputs), run(reference.prefix_attn, inputs)
    bounds = attention_bounds(inputs, truth)
    assert not mismatches(eager, truth, bounds, lambda: eager)
    assert bool(mismatches(eager, truth, bounds)) == (dtype != "float32")


def test_large_calls_are_cut_by_heads(monkeypatch):
    monkeypatch.setattr(gate, "DENSE_LIMIT", 0)
    assert not gate.correctness_gate("reference", CASE)
    assert not gate.correctness_gate("reference", CASE, gradients=False)


def test_a_case_reruns_from_its_text(capsys):
    for seed in range(50):
        case = random_case(seed)
        assert parse_case(repr(case)) == case and random_case(seed) == case
    assert main([repr(CASE), "--backend", "reference"]) == 0
    assert capsys.readouterr().out == f"reference: {CASE!r}\ncorrect\n"
    for text in ("Case(__import__('os'))", "print(1)", "Case(seqlen_q=open('x'))"):
        with pytest.raises(ValueError):
            parse_case(text)


def test_inputs_are_poisoned_and_the_same_twice():
    """NaN in the slots that nobody sees, and nowhere else."""
    case = Case(2, 6, 12, 2, 2, 8, key_range=((3, 12), (0, 5)), query_start=(0, 6), layout="fused")
    first, second = build(case), build(case)
    seen = first.visible()
    for name, used in (("q", seen.any(2)), ("k", seen.any(1)), ("v", seen.any(1))):
        tensor = getattr(first, name)
        assert torch.equal(tensor.isnan(), ~used[:, :, None, None].expand_as(tensor)), name
        assert torch.equal(tensor.nan_to_num(9), getattr(second, name).nan_to_num(9))
