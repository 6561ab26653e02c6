"""Every instruction set gives the documented result where numbers end: subnormals, infinities, NaN, rows of -inf."""

import json
import os
import subprocess
import sys

import pytest
from internvl_kernels import registration

ISAS = registration.cpu_info().get("supported", [])
pytestmark = pytest.mark.skipif(not ISAS, reason=str(registration.LIBRARY_ERROR))

SCRIPT = """
import json, sys
import torch
from internvl_kernels import clip_qk_layernorm, reference, registration
torch.set_num_threads(1)
inf, nan = torch.inf, torch.nan
generator = torch.Generator().manual_seed(0)
report = {"isa": registration.cpu_info()["isa"], "problems": [], "values": {}}

def random(*shape):
    return torch.randn(*shape, generator=generator)

def keep(name, tensor, kind):
    report["values"][name + str(kind)] = torch.as_tensor(tensor).flatten()[:400].double().tolist()

for kind in (torch.float32, torch.bfloat16, torch.float16):
    for case, change in {
        "plain": [],
        "q inf": [("q", 3, inf), ("q", 60, -inf)],
        "q nan": [("q", 5, nan)],
        "k inf": [("k", 10, inf), ("k", 40, -inf)],
        "k nan": [("k", 33, nan)],
        "v inf": [("v", 0, inf)],  # in the prefix: every row sees it
        "v nan": [("v", 5, nan)],
    }.items():
        for rows in (1, 70):  # where they stand, and packed
            x = {name: random(1, 70, 2, 24) for name in "qkv"}
            for name, row, value in change:
                x[name][0, row, :, 0] = value
            q, k, v = (x[name].to(kind) for name in "qkv")
            q = q[:, 70 - rows :]
            terms = dict(prefix_len=torch.tensor([12], dtype=torch.int32), alibi_slopes=torch.tensor([0.25, 0.0]))
            out, lse = torch.ops.internvl.prefix_attn(q, k, v, **terms)
            truth = dict(terms, alibi_slopes=terms["alibi_slopes"].double())
            right, right_lse = reference.prefix_attn(q.double(), k.double(), v.double(), **truth)
            for name, found, wanted in (("out", out.double(), right), ("lse", lse.double(), right_lse)):
                odd = ~wanted.isfinite()
                same = (found == wanted) | (found.isnan() & wanted.isnan())
                if not same[odd].all() or not found[~odd].isfinite().all():
                    report["problems"].append(f"{kind} {case} {rows} rows: {name} is not finite elsewhere")
                keep(f"{case} {rows} {name}", found, kind)
    # All visible scores are -inf: nothing weighs anything.
    q, k, v = random(1, 4, 1, 8).to(kind), torch.zeros(1, 4, 1, 8).to(kind), random(1, 4, 1, 8).to(kind)
    q[..., 0], k[..., 0] = inf, -1.0
    out, lse = torch.ops.internvl.prefix_attn(q.nan_to_num(nan=0, posinf=inf), k, v, softmax_scale=1.0)
    keep("-inf rows out", out, kind), keep("-inf rows lse", lse, kind)
    if not (lse == -inf).all() or not (out == 0).all():
        report["problems"].append(f"{kind}: rows of -inf give out {out.flatten()[:3]}, lse {lse.flatten()[:3]}")
    # Subnormal inputs are numbers: tiny q and k weigh all keys alike, and tiny values come out.
    tiny = torch.finfo(kind).smallest_normal / 4
    q, k, v = torch.full((1, 5, 1, 8), tiny), torch.full((1, 5, 1, 8), tiny), torch.full((1, 5, 1, 8), tiny)
    out, lse = torch.ops.internvl.prefix_attn(q.to(kind), k.to(kind), v.to(kind))
    keep("subnormal lse", lse, kind)
    wanted = torch.arange(1, 6).log()
    if not torch.allclose(lse[0, 0], wanted, atol=1e-6):
        report["problems"].append(f"{kind}: subnormal q and k give lse {lse.flatten()}")
    pairs = kind == torch.bfloat16 and report["isa"] == "avx512_bf16"  # reads subnormals as zero
    if not torch.allclose(out.double(), v.to(kind).double(), rtol=0.2, atol=tiny * 1.01 if pairs else 0):
        report["problems"].append(f"{kind}: subnormal values come out as {out.flatten()[:3]}")
    x = random(3, 24).to(kind)
    x[0, 0], x[1, 9], x[2, 17] = inf, nan, -inf
    weight = torch.ones(8)
    for clip in (None, 2.0):
        for name, tensor in zip("qkv", clip_qk_layernorm(x, 8, 8, clip, weight, weight, weight, weight), strict=True):
            keep(f"layernorm {clip} {name}", tensor, kind)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def reports():
    found = {}
    for isa in ISAS:
        environment = {**os.environ, "INTERNVL_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found[isa] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("isa", ISAS)
def test_documented_results(reports, isa):
    assert reports[isa]["isa"] == isa
    assert not reports[isa]["problems"], "\n".join(reports[isa]["problems"])


@pytest.mark.parametrize("isa", ISAS[1:])
def test_instruction_sets_agree(reports, isa):
    """Number by number: NaN and infinities at the same places, the rest within a rounding of the dtype."""
    first, other = reports[ISAS[0]]["values"], reports[isa]["values"]
    assert first.keys() == other.keys()
    for name, values in first.items():
        tolerance = 2e-5 if name.endswith("float32") or "lse" in name else 2e-2
        assert values == pytest.approx(other[name], rel=tolerance, abs=tolerance, nan_ok=True), name
