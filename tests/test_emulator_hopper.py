"""Hopper's protocols in the emulator: right kernels raise no report, every mistake is reported."""

import pytest
import torch
from emulator import Session
from emulator.session import machine

SEEDS = (0, 1, 2, 3)


def launch(name, *, seed=0, **options):
    """Run a kernel of selftest/hopper_protocols.cpp: the session, its result and the right one."""
    session = Session(seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-3, 4, (64, 256), generator=generator).bfloat16() for _ in "ab")
    if name == "transposed":
        expected, a, b = a.float() @ b.float().T, a.T.contiguous(), b.T.contiguous()
    else:
        expected = a.float() @ b.float().T
    out = session.output("out", 64, 64, dtype=torch.bfloat16)
    assert machine.run_hopper(name, session.input("a", a), session.input("b", b), out.data_ptr()) == ""
    return session, out, expected.bfloat16()


RIGHT = ("product", "transposed", "copies", "registers")
WRONG = {
    "no wait for full": "missing wait",
    "wrong parity": "missing wait|deadlock",
    "no wait for empty": "race|missing wait",
    "release early": "race",
    "no init fence": "missing fence",
    "no barrier after init": "race|mbarrier",
    "never initialised": "mbarrier",
    "expect less": "missing wait|mbarrier",
    "expect more": "deadlock",
    "expect too many bytes": "mbarrier",
    "arrive twice": "mbarrier",
    "init again": "mbarrier|race",
    "store over barrier": "mbarrier",
    "no wait for products": "missing wait",
    "wait too little": "missing wait",
    "no commit": "missing wait",
    "no wgmma fence": "missing fence",
    "touch accumulators": "registers",
    "wgmma at another line": "divergence",
    "one warp missing": "deadlock|divergence",
    "shifted descriptor": "descriptor",
    "overwrite operand": "race",
    "no proxy fence": "missing fence",
    "no barrier before store": "race",
    "no wait for store": "missing wait",
    "overwrite staging": "race",
    "not a tensor map": "tensor map",
    "tensor copy out of bounds": "out of bounds",
    "copies no reader fence": "missing fence",
    "copies do not arrive": "missing wait",
    "release unread": "race",
    "touch a": "registers",
    "setmaxnreg some warps": "registers",
    "setmaxnreg too many": "registers",
    "setmaxnreg wrong way": "registers",
    "setmaxnreg differ": "registers",
}


def test_every_kernel_is_tested():
    assert {*RIGHT, "setmaxnreg", "read accumulators", *WRONG} == set(machine.hopper_names())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_raise_no_report(name, seed):
    session, out, expected = launch(name, seed=seed, sum_order=seed)
    session.check()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", list(WRONG))
def test_every_mistake_is_reported(name, seed):
    session, _, _ = launch(name, seed=seed)
    kinds = session.kinds()
    assert kinds & set(WRONG[name].split("|")), kinds
    text = " ".join(text for kind, text, _ in session.reports() if kind in WRONG[name])
    assert "selftest/hopper_protocols.cpp:" in text


def test_accumulators_are_not_a_number_until_the_wait():
    _, out, expected = launch("read accumulators")
    wrong = out != expected
    assert wrong.sum() == 64 * 64 // 32 and out[wrong].isnan().all()


def test_registers_move_between_warpgroups():
    session, _, _ = launch("setmaxnreg")
    assert session.kinds() == {"unwritten"}  # it multiplies nothing


@pytest.mark.parametrize("name", RIGHT)
def test_every_wait_and_fence_is_needed(name):
    session, _, _ = launch(name)
    (counts,) = session.kernels().values()
    sites = counts["synchronising"]
    wanted = {"mbarrier_wait_parity", "fence_proxy_async_shared", "wgmma_fence", "wgmma_wait_group"}
    assert wanted <= set(sites.values())
    for site, kind in sites.items():
        seen = []
        for seed in SEEDS:
            session, out, expected = launch(name, seed=seed, skip=site)
            seen.append(bool(session.reports()) or not torch.equal(out, expected))
        assert any(seen), f"{kind} at {site} was left out and nothing noticed"


def test_counts():
    session, _, _ = launch("product")
    (counts,) = session.kernels().values()
    assert counts["wgmma"] == 16 and counts["wgmma_products"] == 64 * 64 * 256
    assert counts["bulk_loads"] == 8 and counts["bulk_load_bytes"] == 2 * 64 * 256 * 2
    assert counts["bulk_stores"] == 1 and counts["bulk_store_bytes"] == 64 * 64 * 2


def test_reports_say_where_and_what():
    session, _, _ = launch("release early")
    text = next(text for kind, text, _ in session.reports() if kind == "race")
    assert "may still be reading it: no wait lies between" in text and "the wgmma of warpgroup 0 issued at" in text
    session, _, _ = launch("expect more")
    text = next(text for kind, text, _ in session.reports() if kind == "deadlock")
    assert "for phase parity 0 of the mbarrier at offset" in text and "lacks 0 arrivals and 16 bytes" in text
    session, _, _ = launch("no proxy fence")
    text = next(text for kind, text, _ in session.reports() if kind == "missing fence")
    assert "used asynchronously with no fence.proxy.async after it was written by thread" in text
