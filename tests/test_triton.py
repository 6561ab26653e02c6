"""Triton kernels without a GPU: on the interpreter, in processes of their own, and compiled for real targets."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from internvl_kernels import backends, prefix_attention

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def python(*arguments, **environment):
    paths = os.pathsep.join(filter(None, [str(ROOT / "python"), str(ROOT), *sys.path]))
    given = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run(
        [sys.executable, *arguments], env=given, cwd=ROOT, capture_output=True, text=True, check=False
    )


@needs_triton
@pytest.mark.parametrize("name", ("attention", "mask", "norm", "operators"))
def test_on_the_interpreter(name, request):
    """tests/interpreter/test_NAME.py; to rerun a part of it: TRITON_INTERPRET=1 python -m pytest FILE -k PART."""
    chosen = request.config.getoption("-m")
    options = ["-q", "-x", "-p", "no:cacheprovider", *(["-m", chosen] if chosen else [])]
    done = python("-m", "pytest", *options, f"tests/interpreter/test_{name}.py", TRITON_INTERPRET="1")
    if done.returncode == 5:  # this selection holds none of its tests
        pytest.skip("nothing selected")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


@needs_triton
def test_hot_kernels_use_tensor_cores_and_asynchronous_copies():
    """Forward, decoding and backward for compute capability 9.0: no spills, pipelined loads, wgmma in the forward."""
    code = """
from internvl_kernels.triton_kernels import compile
(target,) = compile.targets(["90"])
wanted = ("fwd alibi", "decode alibi", "dkdv alibi", "dq alibi")
builds = [b for b in compile.builds(compile.gpu_keys(target), reduced=True) if b.name in wanted]
assert len(builds) == 4, builds
for build in builds:
    row = compile.measure(build, target)
    assert not compile.faults(build, row) and row["copies"], (build, row)
    row["spill"] = 8
    assert compile.faults(build, {**row, "tensor": 0}) == ["spills 8 bytes", "no tensor-core instruction"]
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-4000:]


@needs_triton
def test_compilers_see_the_kernels():
    """With symbolic shapes a traced forward and backward become launches of the kernels, not opaque operators."""
    code = """
import torch
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from internvl_kernels.triton_kernels import ops

def step(q, k, prefix, slopes):
    op, terms = torch.ops.internvl_triton, {"prefix_len": prefix, "alibi_slopes": slopes}
    out, lse = op.prefix_attn(q, k, k, **terms)
    return op.prefix_attn_backward(out, None, q, k, k, out, lse, **terms)

q, k, prefix = torch.randn(2, 600, 4, 16), torch.randn(2, 700, 2, 16), torch.zeros(2, dtype=torch.int32)
graph = make_fx(dispatch_functionalize(step), tracing_mode="symbolic")(q, k, prefix, torch.rand(4)).graph
names = [str(node.target) for node in graph.nodes]
assert names.count("triton_kernel_wrapper_functional") == 7, names  # norms, forward, norms, and four of the backward
assert not any("internvl_triton" in name for name in names), names
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-4000:]


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles():
    done = python("-m", "internvl_kernels.triton_kernels.compile")
    assert done.returncode == 0, done.stdout[-8000:]


@needs_triton
def test_commands_explain_themselves():
    for command in ("compile", "tune"):
        done = python("-m", f"internvl_kernels.triton_kernels.{command}", "--help")
        assert done.returncode == 0 and "usage: python -m internvl_kernels.triton_kernels" in done.stdout
    if not torch.cuda.is_available():
        done = python("-m", "internvl_kernels.triton_kernels.tune")
        assert done.returncode == 1 and "no GPU" in done.stderr, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_the_backend_says_so():
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(NotImplementedError, match=r"backend .triton. cannot run: .*no CUDA device.*needs cuda"):
        prefix_attention(q, q, q, backend="triton")


def test_without_triton_the_backend_says_so(monkeypatch):
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", False)
    assert "Triton is not installed: pip install triton" in backends.BACKENDS["triton"].here()


def test_the_package_imports_no_triton():
    assert python("-c", "import internvl_kernels, sys; assert 'triton' not in sys.modules").returncode == 0
