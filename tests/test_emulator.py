"""The emulator itself: every instruction has a twin, and every detector finds a kernel that is wrong."""

import re
from pathlib import Path

import pytest
import torch
from emulator import EmulatorError, Session
from emulator.session import machine

SEEDS = (0, 1, 2, 3)


def launch(name, *, seed=0, **options):
    """Run a kernel of selftest/protocols.cpp: the session, its input and its output."""
    session = Session(seed=seed, **options)
    data, out = torch.randn(256), session.workspace("out", 1024).view(torch.float32)
    counter = torch.zeros(1, dtype=torch.int32)
    machine.add("counter", counter.data_ptr(), 4, True)
    error = machine.run_named(name, session.input("in", data), out.data_ptr(), counter.data_ptr())
    assert error == ""
    return session, data, out


def test_every_instruction_has_a_twin_and_is_compiled_for_the_device():
    root = Path(__file__).resolve().parent.parent
    check = "".join((root / f"csrc/cuda/{name}.cu").read_text() for name in ("ptx_check", "ptx_check_sm90"))
    names = {}
    for header in (root / "csrc/cuda/ptx").glob("*.cuh"):
        names[header.stem] = set(re.findall(r"^INTERNVL_PTX_FN .*?(\w+)\(", header.read_text(), re.MULTILINE))
    assert sum(map(len, names.values())) >= 65
    for stem, functions in names.items():
        twin = root / "tests/emulator/include/emulator" / f"{stem}.h"
        text = twin.read_text() if twin.exists() else ""
        for name in functions - {"bits_as", "make_descriptor", "advance"}:  # the same code on both sides
            assert re.search(rf"^inline .*?\b{name}\(", text, re.MULTILINE), f"{twin.name} lacks {name}"
            assert f"ptx::{name}" in check, f"ptx_check*.cu lack {name}"


# ---- protocols that are right: silence and the right result, in any order of warps ----


def last_block_sum(x):
    parts = x[:128].view(4, 32)
    return ((parts[0] + parts[1]) + parts[2]) + parts[3]


RIGHT = {
    "reverse": lambda x: x[:64].flip(0),
    "reverse in warp": lambda x: x[:64].view(2, 32).flip(1).flatten(),
    "two rounds": lambda x: x[:128].view(2, 64).flip(1).flatten(),
    "overwrite ldmatrix": None,
    "pipeline": lambda x: x.view(4, 64).flip(1).flatten(),
    "refill": lambda x: x[:128].view(2, 64).flip(1).flatten(),
    "zero fill": None,
    "producer consumer": lambda x: x[:128].view(4, 32).flip(1).flatten(),
    "last block": last_block_sum,
    "through global": lambda x: torch.cat([x[:64], x[:64].flip(0)]),
    "halves": lambda x: torch.arange(64) + x[0],
    "columns": lambda x: x[:32],
    "rounds": lambda x: 3 + x[:64],
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_pass(name):
    for seed in SEEDS:
        session, data, out = launch(name, seed=seed)
        session.check()
        if RIGHT[name]:
            expected = RIGHT[name](data)
            assert torch.equal(out[: expected.numel()], expected)


def test_partial_copies_fill_up_with_zeros():
    session, data, out = launch("zero fill")
    session.check()
    expected = data.clone().view(64, 4).view(torch.uint8)
    expected[torch.arange(16) >= (torch.arange(64) % 17)[:, None]] = 0
    assert torch.equal(out.view(64, 4).view(torch.uint8), expected)


# ---- mistakes: the kind that must be among the reports ----

WRONG = {
    "reverse no barrier": "race",
    "reverse in warp no barrier": "race",
    "two rounds no barrier": "race",
    "write twice": "race",
    "overwrite ldmatrix no barrier": "race",
    "pipeline no wait": "missing wait",
    "pipeline waits too little": "missing wait",
    "pipeline no commit": "missing wait",
    "pipeline no barrier": "race",
    "pipeline waits after barrier": "race",
    "read as unchanging": "race",
    "refill no barrier": "race",
    "last block no barrier": "race",
    "other block": "race",
    "through global no barrier": "race",
    "shared load out of bounds": "out of bounds",
    "shared store out of bounds": "out of bounds",
    "global load out of bounds": "out of bounds",
    "global store out of bounds": "out of bounds",
    "copy source out of bounds": "out of bounds",
    "copy target out of bounds": "out of bounds",
    "shared address without base": "out of bounds",
    "misaligned shared store": "misaligned",
    "misaligned global load": "misaligned",
    "misaligned copy source": "misaligned",
    "misaligned global store": "misaligned",
    "uninitialised shared": "uninitialised",
    "uninitialised half": "uninitialised",
    "uninitialised global": "uninitialised",
    "uninitialised ldmatrix": "uninitialised",
    "write input": "written input",
    "some lanes shuffle": "divergence",
    "lanes shuffle at two places": "divergence",
    "a lane has ended": "divergence",
    "lanes in different collectives": "divergence",
    "a warp never comes": "deadlock",
    "no such barrier": "barrier",
    "lanes name different barriers": "divergence",
    "warps wait for each other": "deadlock",
    "different sync_threads": "barrier",
    "arrives twice": "barrier",
    "rounds without end": "deadlock",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_reported(name):
    for seed in SEEDS:
        session, _, _ = launch(name, seed=seed)
        assert WRONG[name] in session.kinds(), session.reports()
        assert all("selftest/" in text for _, text, _ in session.reports())
        with pytest.raises(EmulatorError, match=WRONG[name]):
            session.check()


@pytest.mark.parametrize("name", ["producer consumer no full", "producer consumer no empty", "barrier sizes differ"])
def test_wrong_named_barriers_are_reported(name):
    for seed in SEEDS:
        assert launch(name, seed=seed)[0].kinds() & {"race", "barrier", "deadlock"}


@pytest.mark.parametrize(
    "name", ["reverse", "reverse in warp", "two rounds", "pipeline", "refill", "last block", "rounds"]
)
def test_every_barrier_and_wait_is_needed(name):
    run = launch(name)[0].kernels()[name]
    assert run["synchronising"]
    for site in run["synchronising"]:
        for seed in SEEDS:
            assert launch(name, seed=seed, skip=site)[0].reports(), site


def test_a_loop_without_end_is_reported():
    """Whatever the number of its rounds came from."""
    ((kind, text, _),) = (r for r in launch("rounds without end")[0].reports() if r[0] != "unwritten")
    assert kind == "deadlock" and "selftest/mistakes.cpp:" in text
    assert "goes on, but in the last 8388608 calls of the block no barrier completed" in text


def test_with_a_wait_left_out_a_launch_ends_at_the_first_report():
    """What follows would only be garbage at work."""
    (site,) = launch("rounds")[0].kernels()["rounds"]["synchronising"]
    for seed in SEEDS:
        ((kind, _, count),) = launch("rounds", seed=seed, skip=site)[0].reports()
        assert kind in ("race", "uninitialised") and count == 1


def test_copies_land_at_the_wait_and_not_before():
    _, data, out = launch("pipeline waits too little")  # reads one group too early, but for the last rounds
    assert out[:128].isnan().all() and not data.isnan().any()


def test_grids_that_no_device_launches_are_refused():
    error = machine.run_named("too tall a grid", 0, 0, 0)
    assert error == "too tall a grid: a grid of 1 x 65536 x 1 blocks; at most 2147483647 x 65535 x 65535 are launched"


def test_unwritten_outputs_and_gaps_of_views():
    session = Session()
    session.output("out", 4)
    assert session.kinds() == {"unwritten"}
    session = Session()
    wide = torch.randn(64, 8)
    out = session.workspace("out", 64 * 4)
    machine.run_copy(4, session.input("in", wide[:, :2]), out.data_ptr())
    assert session.kinds() == {"uninitialised"}  # the kernel reads neighbours that are no elements of the view


# ---- counters ----


def access(name, kind):
    session, _, _ = launch(name, bank_conflicts=True)
    table = session.kernels()[name]["accesses"]
    return [numbers for site, numbers in table.items() if site.endswith(kind)]


def test_bank_conflicts_are_counted():
    assert access("columns", "ld.shared") == [(1, 1, 1)]  # requests, wavefronts, the fewest possible
    assert access("columns in one bank", "ld.shared") == [(1, 32, 1)]
    assert access("rows swizzled", "ldmatrix") == [(1, 4, 4)]
    assert access("rows in one bank", "ldmatrix") == [(1, 32, 4)]
    assert access("rows swizzled", "st.shared") == [(8, 32, 32)]
    assert sorted(access("sectors", "st.global")) == [(1, 5, 4), (1, 8, 1)]


def test_instructions_are_counted():
    run = launch("pipeline")[0].kernels()["pipeline"]
    assert (run["launches"], run["blocks"], run["cp_async"], run["cp_async_bytes"]) == (1, 1, 64, 1024)
    assert (run["ld_shared"], run["st_global"], run["block_barriers"]) == (256, 256, 16)
