"""The CUDA part of the built library, on machines with and without a GPU: what it says, and what it refuses."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from internvl_kernels import backends, env, registration

ROOT = Path(__file__).resolve().parent.parent
BUILT = registration.build_info().get("cuda")


def test_reasons_without_a_device():
    reasons = backends.BACKENDS["cuda"].here()
    assert ("no CUDA device" in reasons) == (not torch.cuda.is_available())
    assert ("this build holds no CUDA kernels" in reasons) == (not BUILT)


def test_fp32_attention_is_refused_with_a_reason():
    cuda = backends.BACKENDS["cuda"]
    extra = set(cuda.op_reasons("prefix_attn", "cuda", torch.float32)) - set(cuda.here())
    assert extra == {"prefix_attn with torch.float32; this backend takes torch.bfloat16, torch.float16"}
    assert set(cuda.op_reasons("prefix_attn", "cuda", torch.bfloat16)) == set(cuda.here())
    assert set(cuda.op_reasons("clip_qk_layernorm", "cuda", torch.float32)) == set(cuda.here())
    with pytest.raises(NotImplementedError, match=r"prefix_attn with torch\.float32"):
        backends.select("prefix_attn", torch.empty(1), "cuda")


@pytest.mark.parametrize(
    "archs,capability,kernels",
    (
        ("80-real,90-real,90a-real,90-virtual", (9, 0), "sm90"),
        ("80-real,90-real,90a-real,90-virtual", (8, 0), "sm80"),
        ("80-real,90-real,90a-real,90-virtual", (10, 0), "sm80"),
        ("80-real,90-real,90-virtual", (9, 0), "sm80"),
    ),
)
def test_the_report_names_the_kernels_of_a_device(monkeypatch, archs, capability, kernels):
    monkeypatch.setattr(registration, "build_info", lambda: {"cuda": True, "cuda_archs": archs})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a device")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert env.report()["cuda_devices"] == [f"a device, {capability[0]}.{capability[1]}, {kernels} kernels"]


@pytest.mark.skipif(not BUILT, reason="built without nvcc")
def test_build_info_lists_what_was_compiled():
    info = registration.build_info()
    assert info["cuda_archs"] and info["nvcc"]
    assert info["cuda_head_dims"] == sorted(info["cuda_head_dims"])
    for op in ("prefix_attn", "prefix_attn_backward", "clip_qk_layernorm", "clip_qk_layernorm_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"internvl::{op}", "CUDA")


@pytest.mark.skipif(not BUILT, reason="built without nvcc")
def test_a_cpu_tensor_that_leads_cuda_ones_is_named():
    """The dispatcher sends a call to the CUDA kernels when any tensor is there."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    q = torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16)
    operators = torch.ops.internvl
    with pytest.raises(ValueError, match="prefix_attn: q is not on a CUDA device; other arguments are"):
        operators.prefix_attn.default.redispatch(keys, q, q, q)
    with pytest.raises(ValueError, match="clip_qk_layernorm: qkv is not on a CUDA device"):
        operators.clip_qk_layernorm.default.redispatch(keys, q, 4, 2, None, None, None, None, None, 1e-5)


@pytest.mark.skipif(not BUILT, reason="built without nvcc")
def test_no_kernel_spills():
    report = subprocess.run([sys.executable, ROOT / ".ci/cuda_resources.py"], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    for kernel in ("prefix_attn_fwd_kernel", "prefix_attn_decode_kernel"):
        assert kernel in report.stdout


def resources():
    """.ci/cuda_resources.py as a module."""
    spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / ".ci/cuda_resources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ("clip_qk_layernorm_bwd_kernel", "prefix_attn_fwd_kernel", "bwd_rows_kernel"))
@pytest.mark.parametrize("text", ("STL [R1+0x8], R5", "@!P0 LDL.64 R4, [R1]"))
def test_the_report_fails_on_one_spill_of_any_kernel(name, text):
    clean = [(0, "MOV R1, c[0x0][0x28]"), (16, "LDG.E R2, [R4.64]"), (32, "EXIT")]
    assert resources().failures_of("sm_80", name, 32, clean) == []
    found = resources().failures_of("sm_80", name, 32, [*clean, (48, text)])
    assert found == [f"{name} on sm_80: 1 loads and stores of spilled registers"]


def test_the_report_looks_at_hopper_products():
    found = resources().failures_of("sm_90a", "prefix_attn_fwd_kernel", 168, [(0, "EXIT")])
    assert len(found) == 3 and "wgmma" in found[0] and "setmaxnreg" in found[1] and "beside" in found[2]
    found = resources().failures_of("sm_90a", "prefix_attn_decode_kernel", 168, [(0, "EXIT")])
    assert len(found) == 1 and "wgmma" in found[0]  # its warps keep their registers
