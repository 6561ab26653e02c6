"""The CUDA part of the built library, on machines with and without a GPU: what it says, and what it refuses."""

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
def test_main_attention_kernels_do_not_spill():
    report = subprocess.run([sys.executable, ROOT / ".ci/cuda_resources.py"], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    for kernel in ("prefix_attn_fwd_kernel", "prefix_attn_decode_kernel"):
        assert kernel in report.stdout
