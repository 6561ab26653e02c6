"""Every barrier and wait of the CUDA kernels is needed: left out, something is reported or wrong."""

import dataclasses
import functools

import pytest
from emulator import operators
from internvl_kernels import reference
from internvl_kernels.testing import Case, attention_bounds, build, mismatches, oracle, run, structured_cases

NAMES = (
    "alibi-prefix",
    "segments-flags",
    "decode-grouped",
    "range-empty",
    "decode",
    "segments-outside",
    "flags-prefix",
    "flags-holes",
)
# Segments that fill whole tiles, met by queries behind the last key.
OUTSIDE = Case(
    seqlen_q=600,
    seqlen_k=600,
    heads_q=1,
    heads_kv=1,
    dtype="bfloat16",
    segments="packed",
    query_start=(40,),
    prefix_len=(600,),
)
# Lists of more tiles than a block has threads, few of which are visible.
LONG = {
    "many keys": Case(seqlen_q=70, seqlen_k=17000, heads_q=1, heads_kv=1, window=40, dtype="bfloat16", alibi="mpt"),
    "many queries": Case(
        seqlen_q=17000, seqlen_k=40, heads_q=1, heads_kv=1, dtype="bfloat16", query_start=(-8500,), window=30
    ),
}
# A decoding block without key tiles.
NOTHING = Case(seqlen_q=1, seqlen_k=64, heads_q=1, heads_kv=1, dtype="bfloat16", key_range=((9, 9),))
QUICK = 4  # sites that are tried in `make test`


@functools.cache
def cases():
    structured = structured_cases()
    short = {name: dataclasses.replace(structured[name], dtype="bfloat16") for name in NAMES}
    return short | LONG | {"outside": OUTSIDE, "nothing": NOTHING}


@functools.cache
def sites():
    """Barriers and waits ("file:line") that each case executes."""
    found = {}
    for name, case in cases().items():
        with operators.options() as runs:
            run(operators.prefix_attn, build(case), case.gradients)
        for emulated in runs:
            for counts in emulated.counted.values():
                for site in counts["synchronising"]:
                    found.setdefault(site, []).append(name)
    return found


@functools.cache
def expected(name):
    inputs, case = build(cases()[name]), cases()[name]
    truth = oracle(inputs, case.gradients)
    return truth, attention_bounds(inputs, truth), lambda: run(reference.prefix_attn, inputs, case.gradients)


def is_noticed(site, name):
    case = cases()[name]
    with operators.options(skip=site, check=False) as runs:
        results = run(operators.prefix_attn, build(case), case.gradients)
    return any(emulated.seen for emulated in runs) or bool(mismatches(results, *expected(name)))


def needed(site):
    return any(is_noticed(site, name) for name in sites()[site])


def test_some_barriers_and_waits_are_needed():
    every = sorted(sites())
    assert len(every) > QUICK
    for site in every[:: len(every) // QUICK]:
        assert needed(site), site


@pytest.mark.slow
def test_every_barrier_and_wait_is_needed():
    assert [site for site in sorted(sites()) if not needed(site)] == []
