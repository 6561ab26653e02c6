"""prefix_attn, forward and every gradient, on every backend and instruction set that runs here."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from internvl_kernels import backends, registration
from internvl_kernels.testing import Case, build, correctness_gate, device_of, random_case, run, structured_cases
from internvl_kernels.testing.cases import DTYPES, HEAD_DIMS

BACKENDS = [name for name, backend in backends.BACKENDS.items() if name != "reference" and not backend.here()]
STRUCTURED = structured_cases()
pytestmark = pytest.mark.usefixtures("dirty_scratch")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def passes(backend, case):
    """Nothing to complain about, or the complaints after the case."""
    return "\n".join([repr(case), *problems]) if (problems := correctness_gate(backend, case)) else ""


def test_some_backend_runs_here():
    assert BACKENDS, {name: backend.here() for name, backend in backends.BACKENDS.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STRUCTURED)
def test_structured(backend, name, dtype):
    case = dataclasses.replace(STRUCTURED[name], dtype=dtype)
    assert not passes(backend, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(backend, head_dim, dtype):
    """More than a tile of rows and keys, heads sharing keys; and one row (decoding)."""
    case = Case(2, 70, 150, 4, 2, head_dim, dtype, prefix_len=(30, 149), alibi="mpt", seed=head_dim)
    assert not passes(backend, case)
    assert not passes(backend, dataclasses.replace(case, seqlen_q=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", range(1, 9))
def test_decode(backend, seqlen_q, dtype):
    """A static cache, filled in part, NaN beyond; long enough to be split over workers."""
    filled = (900, 613)
    case = Case(
        batch=2,
        seqlen_q=seqlen_q,
        seqlen_k=1000,
        heads_q=6,
        heads_kv=(1, 2, 3, 6)[seqlen_q % 4],
        head_dim=(16, 24)[seqlen_q % 2],
        dtype=dtype,
        key_range=tuple((3 * b, end) for b, end in enumerate(filled)),
        query_start=tuple(end - seqlen_q for end in filled),
        prefix_len=(40, 700),
        alibi="mpt",
        seed=seqlen_q,
    )
    cache = build(case).k
    assert cache[:, 950:].isnan().all()
    assert not passes(backend, case)


def test_decode_equals_the_rows_of_the_whole(backend):
    """Feeding a sequence token by token gives the rows of one call."""
    case = Case(2, 40, 40, 4, 2, 16, prefix_len=(7, 7), alibi="mpt")
    inputs = build(case).to(device=device_of(backend))
    operator = backends.BACKENDS[backend].ops["prefix_attn"]
    out, lse = operator(
        inputs.q, inputs.k, inputs.v, alibi_slopes=inputs.alibi_slopes, prefix_len=inputs.mask["prefix_len"]
    )
    for i in range(7, 40):
        filled = torch.tensor([[0, i + 1]] * 2, dtype=torch.int32, device=out.device)
        start = torch.full((2,), i, dtype=torch.int32, device=out.device)
        k, v = (
            t.clone().index_fill(1, torch.arange(i + 1, 40, device=t.device), torch.nan) for t in (inputs.k, inputs.v)
        )
        row, row_lse = operator(
            inputs.q[:, i : i + 1], k, v, alibi_slopes=inputs.alibi_slopes, key_range=filled, query_start=start
        )
        torch.testing.assert_close(row[:, 0], out[:, i], atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(row_lse[..., 0], lse[..., i], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("block", range(10))
def test_random(backend, block):
    failures = [text for seed in range(60 * block, 60 * block + 60) if (text := passes(backend, random_case(seed)))]
    assert not failures, "\n\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_random_sweep(backend, block):
    failures = [
        text
        for seed in range(10**6 + 100 * block, 10**6 + 100 * block + 100)
        if (text := passes(backend, random_case(seed)))
    ]
    assert not failures, "\n\n".join(failures)


# --- every instruction set of this processor: the choice is made when the library loads, so one process each

SWEEP = """
import json, sys
import torch
from internvl_kernels import registration
from internvl_kernels.testing import Case, correctness_gate, random_case, structured_cases
torch.set_num_threads(1)
cases = list(structured_cases().values()) + [random_case(5000 + seed) for seed in range(int(sys.argv[1]))]
for n, dim in enumerate((1, 3, 5, 8, 15, 31, 64, 80, 96, 112, 128, 200, 256)):
    dtype = ("float32", "bfloat16", "float16")[n % 3]
    cases.append(Case(1, 50, 140, 2, 1, dim, dtype, prefix_len=(60,), alibi="mpt", seed=dim))
    cases.append(Case(1, 2, 140, 2, 1, dim, dtype, prefix_len=(60,), alibi="mpt", seed=dim))
failures = {repr(case): problems for case in cases if (problems := correctness_gate("cpu", case))}
print(json.dumps({"isa": registration.cpu_info()["isa"], "cases": len(cases), "failures": failures}))
"""


def sweep(isa, count):
    environment = {**os.environ, "INTERNVL_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("INTERNVL_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, str(count)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("isa", registration.cpu_info().get("supported", []))
def test_every_instruction_set(isa):
    found = sweep(isa, 40)
    assert found["isa"] == isa
    assert not found["failures"], f"INTERNVL_CPU_ISA={isa}\n" + json.dumps(found["failures"], indent=2)


@pytest.mark.slow
@pytest.mark.parametrize("isa", registration.cpu_info().get("supported", []))
def test_every_instruction_set_sweep(isa):
    found = sweep(isa, 1500)
    assert not found["failures"], f"INTERNVL_CPU_ISA={isa}\n" + json.dumps(found["failures"], indent=2)


# --- determinism


def same_bits(a, b):
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {"seqlen_q": 150, "seqlen_k": 150, "heads_q": 8, "heads_kv": 2},
        {"seqlen_q": 150, "seqlen_k": 150, "key_flags": "holes", "segments": "packed"},
        {"seqlen_q": 1, "seqlen_k": 1500},
        {"seqlen_q": 200, "seqlen_k": 1000, "batch": 1},  # far tiles are skipped
        {"seqlen_q": 5, "seqlen_k": 3000, "heads_q": 6, "heads_kv": 1, "batch": 1},
    ],
    ids=str,
)
def test_same_bits_at_every_thread_count(backend, changes, dtype):
    """The same inputs give the same bits, whoever computes them."""
    case = dataclasses.replace(Case(2, heads_q=4, heads_kv=4, head_dim=40, dtype=dtype, alibi="random"), **changes)
    inputs = build(case).to(device=device_of(backend))
    operator = backends.BACKENDS[backend].ops["prefix_attn"]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(run(operator, inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:]), repr(case)


def test_no_grad_gives_the_same_bits(backend):
    inputs = build(random_case(3)).to(device=device_of(backend))
    operator = backends.BACKENDS[backend].ops["prefix_attn"]
    tracked, plain = run(operator, inputs), run(operator, inputs, None)
    assert same_bits({name: tracked[name] for name in plain}, plain)


# --- gradients through lse


def test_key_halves_merge_through_lse(backend):
    """Two devices hold half of the keys each: merged by lse, outputs and gradients are those of the whole."""
    case = Case(2, 60, 60, 4, 2, 24, prefix_len=(20, 45), alibi="random", seed=5)
    inputs = build(case).to(device=device_of(backend))
    operator = backends.BACKENDS[backend].ops["prefix_attn"]

    def merged(q, k, v, **terms):
        start = torch.zeros(2, dtype=torch.int32, device=q.device)
        parts = [
            operator(
                q,
                k,
                v,
                query_start=start,
                key_range=torch.tensor([span] * 2, dtype=torch.int32, device=q.device),
                **terms,
            )
            for span in ((0, 33), (33, 60))
        ]
        lse = torch.logaddexp(*(part_lse for _, part_lse in parts))
        weights = [(part_lse - lse).exp().transpose(1, 2)[..., None] for _, part_lse in parts]
        return sum(weight * out for weight, (out, _) in zip(weights, parts, strict=True)), lse

    def whole(q, k, v, **terms):
        return operator(q, k, v, **terms)

    inputs.mask = {"prefix_len": inputs.mask["prefix_len"]}
    # Causal rows see nothing of the second half: lse is -inf there and must not disturb the merge.
    wanted, found = run(whole, inputs), run(merged, inputs)
    for name in wanted:
        scale = max(1.0, float(wanted[name].abs().max()))
        torch.testing.assert_close(
            found[name], wanted[name], atol=2e-5 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_lse_gradient_is_the_softmax(backend):
    """d lse / d slope = -E[distance]: against a difference quotient."""
    q, k = (torch.randn(1, 9, 2, 8, device=device_of(backend)) for _ in "qk")
    operator = backends.BACKENDS[backend].ops["prefix_attn"]
    slopes = torch.tensor([0.3, 0.05], device=q.device, requires_grad=True)
    (found,) = torch.autograd.grad(operator(q, k, k, alibi_slopes=slopes)[1].sum(), slopes)
    step = 1e-2
    high, low = (operator(q, k, k, alibi_slopes=slopes.detach() + s)[1].sum((0, 2)) for s in (step, -step))
    torch.testing.assert_close(found, (high - low) / (2 * step), rtol=1e-2, atol=1e-2)


# --- memory

MEMORY = """
import resource, sys
import torch
import internvl_kernels
torch.set_num_threads(2)
S = int(sys.argv[1])
q, k, v = (torch.randn(1, S, 1, 16) for _ in range(3))
grad = torch.ones_like(q)
terms = {"prefix_len": torch.tensor([S // 4], dtype=torch.int32), "alibi_slopes": torch.tensor([0.5]), "window": 64}
if sys.argv[2] == "flags":
    terms["key_flags"] = torch.ones(1, S, dtype=torch.uint8)
    terms["segment_ids"] = torch.arange(S, dtype=torch.int32)[None] // 4096
    del terms["prefix_len"]
q.requires_grad_()
out, _ = torch.ops.internvl.prefix_attn(q[:, :64], k[:, :64], v[:, :64])
out.sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out, _ = torch.ops.internvl.prefix_attn(q, k, v, **terms)
out.backward(grad)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units elsewhere")
@pytest.mark.skipif("cpu" not in BACKENDS, reason="measures the compiled CPU kernels")
@pytest.mark.parametrize("form", ["compact", "flags"])
def test_memory_is_linear(form):
    """Peak growth of a forward and backward at S = 16384: a multiple of S * D, far below one S x S buffer."""
    seqlen, head_dim = 16384, 16
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(seqlen), form], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert grown < 64 * seqlen * head_dim * 4 < seqlen * seqlen / 2, f"grew by {grown / 2**20:.0f} MiB"
