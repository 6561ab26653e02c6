"""Forward and backward of prefix_attn on the emulated CUDA kernels, one feeding the other, by the rule of the gate."""

import dataclasses
import functools

import pytest
import torch
from emulator import operators
from internvl_kernels import reference
from internvl_kernels.testing import (
    Case,
    attention_bounds,
    build,
    mismatches,
    oracle,
    random_case,
    run,
    structured_cases,
)

DTYPES = ("bfloat16", "float16")
STRUCTURED = structured_cases()
FP16_HEAD_DIM = 128  # the largest fp16 instance that the emulator is built with


@functools.lru_cache(maxsize=4)
def expected(case):
    """The oracle's results, their bounds, and what eager attention gets."""
    inputs = build(case)
    truth = oracle(inputs, case.gradients)
    return truth, attention_bounds(inputs, truth), lambda: run(reference.prefix_attn, inputs, case.gradients)


def emulate(case, **options):
    """The results of a case, and the runs of its forward and backward."""
    with operators.options(**options) as runs:
        return run(operators.prefix_attn, build(case), case.gradients), runs


def check(case, **options):
    results, runs = emulate(case, **options)
    problems = mismatches(results, *expected(case))
    assert not problems, "\n".join([repr(case), *problems])
    return results, runs


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_cases(name):
    case = STRUCTURED[name]
    check(dataclasses.replace(case, dtype=DTYPES[case.seed % 2]), seed=case.seed, sum_order=case.seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_cases_in_the_other_dtype(name):
    case = STRUCTURED[name]
    check(dataclasses.replace(case, dtype=DTYPES[1 - case.seed % 2]), seed=case.seed + 1, sum_order=case.seed + 1)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 200, 256])
def test_head_dims(head_dim):
    check(dataclasses.replace(STRUCTURED["alibi-prefix"], dtype="bfloat16", head_dim=head_dim), seed=head_dim)


@pytest.mark.parametrize("name", ["alibi-prefix", "decode-grouped", "segments-flags"])
def test_fp16_at_another_head_dim(name):
    """Forward, decoding and backward."""
    check(dataclasses.replace(STRUCTURED[name], dtype="float16", head_dim=FP16_HEAD_DIM))


def random_16_bit_case(seed):
    case = random_case(seed)
    dtype = "float16" if seed % 2 and case.head_dim <= FP16_HEAD_DIM else "bfloat16"
    return dataclasses.replace(case, dtype=dtype)


@pytest.mark.parametrize("seed", range(16))
def test_random_cases(seed):
    check(random_16_bit_case(seed), seed=seed, sum_order=seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16, 400))
def test_more_random_cases(seed):
    check(random_16_bit_case(seed), seed=seed, sum_order=seed)


@pytest.mark.parametrize("name", ["alibi", "multi-query", "decode"])
def test_any_order_of_blocks_and_warps_gives_the_same_bits(name):
    case = dataclasses.replace(STRUCTURED[name], dtype="bfloat16")
    first, _ = emulate(case, seed=1)
    for seed in (2, 3):
        results, _ = emulate(case, seed=seed)
        assert all(torch.equal(first[key], results[key]) for key in first)


@pytest.mark.parametrize("name", ["causal", "alibi-prefix", "decode-grouped"])
def test_truncating_sums_stay_within_the_rule(name):
    check(dataclasses.replace(STRUCTURED[name], dtype="bfloat16"), toward_zero=True)


def test_distance_pruning_leaves_tiles_out_and_changes_nothing():
    case = Case(seqlen_q=1100, seqlen_k=1100, head_dim=64, alibi="mpt", dtype="bfloat16", softmax_scale=0.02)
    pruned, runs = check(case)
    whole, whole_runs = check(case, prune=False)
    assert all(torch.allclose(pruned[key].float(), whole[key].float(), rtol=0.02, atol=2e-3) for key in pruned)
    for run_pruned, run_whole in zip(runs, whole_runs, strict=True):
        for name, counts in run_whole.counted.items():
            if name.startswith("prefix_attn") and counts["mma"]:
                assert run_pruned.counted[name]["mma"] < 0.9 * counts["mma"], name


@pytest.mark.parametrize("head_dim", [64, 128])
def test_shared_memory_is_read_and_written_without_bank_conflicts(head_dim):
    case = dataclasses.replace(STRUCTURED["alibi-prefix"], dtype="bfloat16", head_dim=head_dim)
    _, runs = emulate(case, bank_conflicts=True)
    for emulated in runs:
        for name, counts in emulated.counted.items():
            shared = [numbers for site, numbers in counts["accesses"].items() if "global" not in site]
            wavefronts, fewest = (sum(numbers[i] for numbers in shared) for i in (1, 2))
            assert wavefronts <= 1.02 * fewest, (name, counts["accesses"])
