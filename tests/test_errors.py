"""Every rejection: the kind of error, the argument's name, the value found, what is allowed; and nothing is changed."""

import os
import re
import subprocess
import sys

import pytest
import torch
from internvl_kernels import backends, clip_qk_layernorm, prefix_attention, registration

pytestmark = pytest.mark.skipif(bool(registration.LIBRARY_ERROR), reason=str(registration.LIBRARY_ERROR))
REJECTED = (ValueError, NotImplementedError)
NAN, INF = float("nan"), float("inf")


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def qkv(**changes):
    return {"q": rand(2, 3, 4, 8), "k": rand(2, 5, 2, 8), "v": rand(2, 5, 2, 8)} | changes


def flags(*shape, dtype=torch.uint8):
    return torch.ones(shape, dtype=dtype)


# name: (arguments, words of the message). Tensors of five keys, three queries, four heads sharing two.
ATTENTION = {
    "q rank": (lambda: qkv(q=rand(2, 3, 8)), ["q has shape [2, 3, 8]", "[batch, seqlen, heads, head_dim]"]),
    "q scalar": (lambda: qkv(q=rand()), ["q has shape []"]),
    "k rank": (lambda: qkv(k=rand(5, 2, 8)), ["k has shape [5, 2, 8]"]),
    "v rank": (lambda: qkv(v=rand(2, 5, 2, 8, 1)), ["v has shape [2, 5, 2, 8, 1]"]),
    "k batch": (lambda: qkv(k=rand(3, 5, 2, 8)), ["k has shape [3, 5, 2, 8]", "expected [2, 5, 2, 8]"]),
    "v keys": (lambda: qkv(v=rand(2, 4, 2, 8)), ["v has shape [2, 4, 2, 8]", "expected [2, 5, 2, 8]"]),
    "v heads": (lambda: qkv(v=rand(2, 5, 1, 8)), ["v has shape [2, 5, 1, 8]"]),
    "v head dim": (lambda: qkv(v=rand(2, 5, 2, 16)), ["v has shape [2, 5, 2, 16]"]),
    "k head dim": (lambda: qkv(k=rand(2, 5, 2, 9)), ["k has shape [2, 5, 2, 9]", "expected [2, 5, 2, 8]"]),
    "head count": (lambda: qkv(q=rand(2, 3, 3, 8)), ["q has 3 heads", "k has 2", "multiple"]),
    "more kv heads": (lambda: qkv(q=rand(2, 3, 1, 8)), ["q has 1 heads", "k has 2"]),
    "no heads": (lambda: {n: rand(1, 2, 0, 8) for n in "qkv"}, ["q has 0 heads"]),
    "head dim 257": (lambda: {n: rand(1, 2, 1, 257) for n in "qkv"}, ["head_dim 257", "1 to 256"]),
    "head dim 0": (lambda: {n: rand(1, 2, 1, 0) for n in "qkv"}, ["head_dim 0", "1 to 256"]),
    "k dtype": (lambda: qkv(k=rand(2, 5, 2, 8, dtype=torch.bfloat16)), ["k has dtype BFloat16", "q's Float"]),
    "v dtype": (lambda: qkv(v=rand(2, 5, 2, 8, dtype=torch.float64)), ["v has dtype Double", "q's Float"]),
    "q last dim": (lambda: qkv(q=rand(2, 3, 8, 4).mT), ["q has stride 4", "allowed: 1"]),
    "k last dim": (lambda: qkv(k=rand(2, 5, 2, 16)[..., ::2]), ["k has stride 2", "allowed: 1"]),
    "v last dim": (lambda: qkv(v=rand(2, 5, 2, 1).expand(2, 5, 2, 8)), ["v has stride 0", "allowed: 1"]),
    "k meta": (lambda: qkv(k=rand(2, 5, 2, 8).to("meta")), ["k is on meta", "q is on cpu"]),
    "v meta": (lambda: qkv(v=rand(2, 5, 2, 8).to("meta")), ["v is on meta", "q is on cpu"]),
    "prefix meta": (lambda: qkv(prefix_len=ints(1, 2).to("meta")), ["prefix_len is on meta", "q is on cpu"]),
    "slopes meta": (lambda: qkv(alibi_slopes=rand(4).to("meta")), ["alibi_slopes is on meta", "q is on cpu"]),
    "prefix shape": (lambda: qkv(prefix_len=ints(1, 2, 3)), ["prefix_len has shape [3]", "[batch] = [2]"]),
    "prefix scalar": (lambda: qkv(prefix_len=torch.tensor(1, dtype=torch.int32)), ["prefix_len has shape []"]),
    "prefix dtype": (lambda: qkv(prefix_len=torch.tensor([1, 2])), ["prefix_len has dtype Long", "allowed: Int"]),
    "prefix float": (lambda: qkv(prefix_len=rand(2)), ["prefix_len has dtype Float", "allowed: Int"]),
    "start shape": (lambda: qkv(query_start=ints([0], [0])), ["query_start has shape [2, 1]", "[batch] = [2]"]),
    "start dtype": (lambda: qkv(query_start=torch.zeros(2).long()), ["query_start has dtype Long", "allowed: Int"]),
    "range shape": (lambda: qkv(key_range=ints(0, 5)), ["key_range has shape [2]", "[batch, 2] = [2, 2]"]),
    "range columns": (lambda: qkv(key_range=ints([0, 1, 2], [0, 1, 2])), ["key_range has shape [2, 3]"]),
    "range dtype": (lambda: qkv(key_range=ints([0, 5], [0, 5]).long()), ["key_range has dtype Long", "allowed: Int"]),
    "range negative": (lambda: qkv(key_range=ints([0, 5], [-1, 3])), ["key_range[1] is [-1, 3)", "0 <= start <= end"]),
    "range decreasing": (lambda: qkv(key_range=ints([4, 2], [0, 5])), ["key_range[0] is [4, 2)", "start <= end"]),
    "segments shape": (lambda: qkv(segment_ids=ints([0] * 3, [0] * 3)), ["segment_ids has shape [2, 3]", "[2, 5]"]),
    "segments dtype": (lambda: qkv(segment_ids=flags(2, 5, dtype=torch.int64)), ["segment_ids has dtype Long", "Int"]),
    "slopes shape": (lambda: qkv(alibi_slopes=rand(2)), ["alibi_slopes has shape [2]", "[heads_q] = [4]"]),
    "slopes matrix": (lambda: qkv(alibi_slopes=rand(2, 4)), ["alibi_slopes has shape [2, 4]"]),
    "slopes dtype": (lambda: qkv(alibi_slopes=rand(4).bfloat16()), ["alibi_slopes has dtype BFloat16", "Float"]),
    "scale nan": (lambda: qkv(softmax_scale=NAN), ["softmax_scale is nan", "finite"]),
    "scale inf": (lambda: qkv(softmax_scale=-INF), ["softmax_scale is -inf", "finite"]),
    "scale beyond fp32": (lambda: qkv(softmax_scale=1e39), ["softmax_scale is 1e+39", "finite fp32"]),
    "window negative": (lambda: qkv(window=-1), ["window is -1", "0 (none)"]),
    "window too large": (lambda: qkv(window=2**31), ["window is 2147483648", "1073741824"]),
}
RAW_ATTENTION = {
    "q dtype": (lambda: {n: t.double() for n, t in qkv().items()}, ["q has dtype Double", "Float, BFloat16, Half"]),
    "q integer": (lambda: {n: t.int() for n, t in qkv().items()}, ["q has dtype Int", "Float, BFloat16, Half"]),
    "flags and prefix": (
        lambda: qkv(key_flags=flags(2, 5), prefix_len=ints(1, 2)),
        ["key_flags and prefix_len", "both given", "replaces"],
    ),
    "flags and range": (
        lambda: qkv(key_flags=flags(2, 5), key_range=ints([0, 1], [0, 1])),
        ["key_flags and key_range", "both given"],
    ),
    "flags shape": (lambda: qkv(key_flags=flags(2, 4)), ["key_flags has shape [2, 4]", "[batch, seqlen_k] = [2, 5]"]),
    "flags dtype": (lambda: qkv(key_flags=flags(2, 5, dtype=torch.bool)), ["key_flags has dtype Bool", "Byte"]),
    "flags meta": (lambda: qkv(key_flags=flags(2, 5).to("meta")), ["key_flags is on meta", "q is on cpu"]),
}
HOLES = torch.tensor([[1, 0, 1, 0, 1]] * 2)
PYTHON_ATTENTION = {
    "q dtype": (lambda: {n: t.double() for n, t in qkv().items()}, ["torch.float64", "cpu:", "torch.bfloat16"]),
    "q complex": (lambda: {n: t.cfloat() for n, t in qkv().items()}, ["torch.complex64", "reference"]),
    "q meta": (lambda: {n: t.to("meta") for n, t in qkv().items()}, ["meta", "cpu:", "reference"]),
    "both prefixes": (
        lambda: qkv(bidirectional_mask=HOLES, prefix_len=ints(1, 1)),
        ["bidirectional_mask and prefix_len were both given"],
    ),
    "both ranges": (
        lambda: qkv(key_padding_mask=HOLES, key_range=ints([0, 1], [0, 1])),
        ["key_padding_mask and key_range were both given"],
    ),
    "mask shape": (
        lambda: qkv(bidirectional_mask=HOLES[:1]),
        ["bidirectional_mask has shape [1, 5]", "[batch, seqlen_k] = [2, 5]"],
    ),
    "mask rank": (lambda: qkv(key_padding_mask=HOLES[..., None]), ["key_padding_mask has shape [2, 5, 1]"]),
    "mask dtype": (lambda: qkv(key_padding_mask=HOLES.float()), ["key_padding_mask has dtype torch.float32", "bool"]),
    "mask meta": (lambda: qkv(key_padding_mask=HOLES.to("meta")), ["is on meta", "q is on cpu"]),
    "k rank with a mask": (lambda: qkv(k=rand(5), key_padding_mask=HOLES), ["[2, 5]", "[5]"]),
    "mask and prefix shape": (
        lambda: qkv(key_padding_mask=HOLES, prefix_len=ints(1, 2, 3)),
        ["prefix_len has shape [3]", "expected [2]"],
    ),
    "mask and prefix dtype": (
        lambda: qkv(key_padding_mask=HOLES, prefix_len=rand(2)),
        ["prefix_len", "torch.float32", "torch.int32"],
    ),
    "mask and range shape": (
        lambda: qkv(bidirectional_mask=HOLES, key_range=ints(0, 1)),
        ["key_range has shape [2]", "expected [2, 2]"],
    ),
    "unknown backend": (lambda: qkv(backend="gpu"), ["backend is 'gpu'", "'cuda', 'triton', 'cpu', 'reference'"]),
    "cpu on meta": (
        lambda: {n: t.to("meta") for n, t in qkv().items()} | {"backend": "cpu"},
        ["backend 'cpu' cannot run", "tensors are on meta", "needs cpu"],
    ),
}


def projection(**changes):
    names = ("clip", "q_weight", "q_bias", "k_weight", "k_bias")
    given = {"qkv": rand(3, 10), "q_width": 4, "k_width": 3, **dict.fromkeys(names), "eps": 1e-5}
    return given | changes


NORM = {
    "last dimension": (lambda: projection(k_width=4), ["qkv has shape [3, 10]", "q_width + 2 * k_width", "12"]),
    "scalar": (lambda: projection(qkv=rand()), ["qkv has shape []"]),
    "width": (lambda: projection(q_width=-4, k_width=7), ["q_width is -4", "positive"]),
    "k width": (lambda: projection(q_width=10, k_width=0), ["k_width is 0", "positive"]),
    "strided": (lambda: projection(qkv=rand(10, 3).mT), ["qkv has stride 3", "allowed: 1"]),
    "clip zero": (lambda: projection(clip=0.0), ["clip is 0", "positive", "None"]),
    "clip negative": (lambda: projection(clip=-2.5), ["clip is -2.5", "positive"]),
    "clip nan": (lambda: projection(clip=NAN), ["clip is nan", "positive"]),
    "clip infinite": (lambda: projection(clip=INF), ["clip is inf", "finite"]),
    "clip beyond fp32": (lambda: projection(clip=1e39), ["clip is 1e+39"]),
    "clip below fp32": (lambda: projection(clip=1e-60), ["clip is 1e-60"]),
    "eps negative": (lambda: projection(eps=-1.0), ["eps is -1", ">= 0"]),
    "eps nan": (lambda: projection(eps=NAN), ["eps is nan", ">= 0"]),
    "eps beyond fp32": (lambda: projection(eps=1e39), ["eps is 1e+39"]),
    "weight shape": (lambda: projection(q_weight=rand(3)), ["q_weight has shape [3]", "expected [4]"]),
    "weight rank": (lambda: projection(k_weight=rand(1, 3)), ["k_weight has shape [1, 3]", "expected [3]"]),
    "bias shape": (lambda: projection(k_weight=rand(3), k_bias=rand(4)), ["k_bias has shape [4]", "expected [3]"]),
    "weight dtype": (lambda: projection(q_weight=rand(4).double()), ["q_weight has dtype Double", "Float"]),
    "weight half": (lambda: projection(q_weight=rand(4).half()), ["q_weight has dtype Half", "Float"]),
    "weight meta": (lambda: projection(q_weight=rand(4).to("meta")), ["q_weight is on meta", "qkv is on cpu"]),
    "q bias alone": (lambda: projection(q_bias=rand(4)), ["q_bias was given without q_weight"]),
    "k bias alone": (lambda: projection(k_bias=rand(3)), ["k_bias was given without k_weight"]),
    "mixed parameters": (
        lambda: projection(qkv=rand(3, 10).bfloat16(), q_weight=rand(4), k_weight=rand(3).bfloat16()),
        ["k_weight has dtype BFloat16", "q_weight"],
    ),
}
RAW_NORM = {
    "dtype": (lambda: projection(qkv=rand(3, 10).double()), ["qkv has dtype Double", "Float, BFloat16, Half"]),
    "integer": (lambda: projection(qkv=rand(3, 10).int()), ["qkv has dtype Int", "Float, BFloat16, Half"]),
}
PYTHON_NORM = {
    "dtype": (lambda: projection(qkv=rand(3, 10).double()), ["torch.float64", "cpu:", "reference"]),
    "backend": (lambda: projection(backend="none"), ["backend is 'none'", "'cpu'"]),
}


def rejects(call, make, words):
    """It raises one of the two kinds, says so in the words, and leaves its arguments as they were."""
    given = make()
    tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor) and x.device.type == "cpu"}
    before = {name: (x.clone(), x._version) for name, x in tensors.items()}
    with pytest.raises(REJECTED) as caught:
        call(**given)
    message = str(caught.value)
    assert re.match(r"(prefix_att(n|ention)|clip_qk_layernorm)(_backward)?: |backend is ", message), message
    # A fake kernel, which one meta tensor reaches, speaks of torch.float32 where C++ says Float.
    assert all(word in message for word in words), message
    for name, x in tensors.items():
        assert torch.equal(x, before[name][0]) and x._version == before[name][1], name


@pytest.fixture(params=[True, False], ids=["grad", "no_grad"])
def grad_mode(request):
    with torch.set_grad_enabled(request.param):
        yield


@pytest.mark.usefixtures("grad_mode")
@pytest.mark.parametrize("name", ATTENTION | RAW_ATTENTION)
def test_prefix_attn_operator_rejects(name):
    rejects(torch.ops.internvl.prefix_attn, *(ATTENTION | RAW_ATTENTION)[name])


@pytest.mark.usefixtures("grad_mode")
@pytest.mark.parametrize("name", ATTENTION | PYTHON_ATTENTION)
def test_prefix_attention_rejects(name):
    rejects(prefix_attention, *(ATTENTION | PYTHON_ATTENTION)[name])


@pytest.mark.usefixtures("grad_mode")
@pytest.mark.parametrize("name", NORM | RAW_NORM)
def test_clip_qk_layernorm_operator_rejects(name):
    rejects(torch.ops.internvl.clip_qk_layernorm, *(NORM | RAW_NORM)[name])


@pytest.mark.usefixtures("grad_mode")
@pytest.mark.parametrize("name", NORM | PYTHON_NORM)
def test_clip_qk_layernorm_rejects(name):
    rejects(clip_qk_layernorm, *(NORM | PYTHON_NORM)[name])


@pytest.mark.parametrize("backend", [n for n, b in backends.BACKENDS.items() if b.here()])
def test_a_backend_that_cannot_run_says_why(backend):
    reasons = backends.BACKENDS[backend].here()
    assert reasons
    rejects(prefix_attention, lambda: qkv(backend=backend), [f"backend '{backend}' cannot run", *reasons])
    rejects(clip_qk_layernorm, lambda: projection(backend=backend), [f"backend '{backend}' cannot run", *reasons])


ATTENTION_BACKWARD = {
    "grad_out shape": (lambda: {"grad_out": rand(2, 3, 4, 9)}, ["grad_out has shape [2, 3, 4, 9]", "[2, 3, 4, 8]"]),
    "grad_out rank": (lambda: {"grad_out": rand(2, 3, 4)}, ["grad_out has shape [2, 3, 4]"]),
    "grad_out dtype": (lambda: {"grad_out": rand(2, 3, 4, 8).half()}, ["grad_out has dtype Half", "expected Float"]),
    "grad_out strided": (lambda: {"grad_out": rand(2, 3, 8, 4).mT}, ["grad_out has stride 4", "allowed: 1"]),
    "grad_lse shape": (lambda: {"grad_lse": rand(2, 3, 4)}, ["grad_lse has shape [2, 3, 4]", "[2, 4, 3]"]),
    "grad_lse dtype": (lambda: {"grad_lse": rand(2, 4, 3).double()}, ["grad_lse has dtype Double", "Float"]),
    "grad_lse meta": (lambda: {"grad_lse": rand(2, 4, 3).to("meta")}, ["grad_lse is on meta", "q is on cpu"]),
    "out shape": (lambda: {"out": rand(2, 2, 4, 8)}, ["out has shape [2, 2, 4, 8]", "[2, 3, 4, 8]"]),
    "lse shape": (lambda: {"lse": rand(2, 4, 4)}, ["lse has shape [2, 4, 4]", "[2, 4, 3]"]),
    "lse dtype": (lambda: {"lse": rand(2, 4, 3).half()}, ["lse has dtype Half", "Float"]),
    "key_range": (lambda: {"key_range": ints([3, 1], [0, 1])}, ["key_range[0] is [3, 1)"]),
    "head count": (lambda: {"k": rand(2, 5, 3, 8), "v": rand(2, 5, 3, 8)}, ["q has 4 heads", "k has 3"]),
}


@pytest.mark.parametrize("name", ATTENTION_BACKWARD)
def test_prefix_attn_backward_rejects(name):
    make, words = ATTENTION_BACKWARD[name]
    good = {"grad_out": rand(2, 3, 4, 8), "grad_lse": None, **qkv(), "out": rand(2, 3, 4, 8), "lse": rand(2, 4, 3)}
    rejects(torch.ops.internvl.prefix_attn_backward, lambda: good | make(), words)


NORM_BACKWARD = {
    "grad_q shape": (lambda: {"grad_q": rand(3, 3)}, ["grad_q has shape [3, 3]", "4"]),
    "grad_k rows": (lambda: {"grad_k": rand(2, 3)}, ["grad_k has shape [2, 3]"]),
    "grad_v rank": (lambda: {"grad_v": rand(1, 3, 3)}, ["grad_v has shape [1, 3, 3]"]),
    "grad_q dtype": (lambda: {"grad_q": rand(3, 4).half()}, ["grad_q has dtype Half", "expected Float"]),
    "grad_v strided": (lambda: {"grad_v": rand(3, 6)[:, ::2]}, ["grad_v has stride 2", "allowed: 1"]),
    "grad_q meta": (lambda: {"grad_q": rand(3, 4).to("meta")}, ["grad_q is on meta", "qkv is on cpu"]),
    "statistics": (lambda: {"statistics": rand(2, 4)}, ["statistics has shape [2, 4]", "4 per row"]),
    "statistics dtype": (lambda: {"statistics": rand(3, 4).double()}, ["statistics", "Double"]),
    "weight": (lambda: {"q_weight": rand(5)}, ["q_weight has shape [5]", "expected [4]"]),
    "clip": (lambda: {"clip": -1.0}, ["clip is -1"]),
}


@pytest.mark.parametrize("name", NORM_BACKWARD)
def test_clip_qk_layernorm_backward_rejects(name):
    make, words = NORM_BACKWARD[name]
    good = {f"grad_{n}": rand(3, width) for n, width in (("q", 4), ("k", 3), ("v", 3))}
    good |= {"qkv": rand(3, 10), "q_width": 4, "k_width": 3, "clip": None, "q_weight": rand(4), "k_weight": rand(3)}
    rejects(torch.ops.internvl.clip_qk_layernorm_backward, lambda: good | {"statistics": rand(3, 4)} | make(), words)


def test_fake_kernels_reject_too():
    """A tracer learns of wrong shapes while tracing; sizes of a batch do not fit, a head is missing."""
    for name in ("k batch", "v keys", "head count", "k head dim", "prefix shape", "slopes shape", "segments shape"):
        given = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in ATTENTION[name][0]().items()}
        with pytest.raises(ValueError, match="expected"):
            torch.ops.internvl.prefix_attn(**given)
    for name in ("last dimension", "weight shape", "bias shape"):
        given = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in NORM[name][0]().items()}
        with pytest.raises(ValueError, match="has shape"):
            torch.ops.internvl.clip_qk_layernorm(**given)


def test_a_failed_call_leaves_the_next_one_alone():
    """Working memory and thread state survive an exception."""
    given = qkv()
    right = prefix_attention(**given)
    for name in ("range decreasing", "head count", "scale nan"):
        with pytest.raises(ValueError):
            prefix_attention(**ATTENTION[name][0]())
        assert torch.equal(prefix_attention(**given), right)


def in_a_process(code, **environment):
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


CALL = "import torch, internvl_kernels as ik; x = torch.zeros(1, 2, 1, 8); ik.prefix_attention(x, x, x); print('ran')"


def test_unknown_instruction_set():
    """Neither ignored nor fatal at import: the operator and the Python call say what is allowed."""
    done = in_a_process(CALL, INTERNVL_CPU_ISA="sse9")
    assert done.returncode == 1 and "NotImplementedError: prefix_attn: no backend can run" in done.stderr, done.stderr
    raw = in_a_process(CALL.replace("ik.prefix_attention", "torch.ops.internvl.prefix_attn"), INTERNVL_CPU_ISA="sse9")
    assert raw.returncode == 1 and "ValueError: INTERNVL_CPU_ISA" in raw.stderr, raw.stderr
    for message in (done.stderr, raw.stderr):
        (line,) = [line for line in message.splitlines() if "INTERNVL_CPU_ISA is 'sse9'" in line]
        assert all(isa in line for isa in registration.cpu_info()["supported"]), line
    assert in_a_process(CALL, INTERNVL_CPU_ISA="").stdout == "ran\n"


def test_default_backend_of_the_environment():
    done = in_a_process(CALL, INTERNVL_BACKEND="gpu")
    assert "ValueError: backend is 'gpu'; allowed: 'cuda', 'triton', 'cpu', 'reference'" in done.stderr
    assert in_a_process(CALL, INTERNVL_BACKEND="reference").stdout == "ran\n"


def test_missing_library():
    """Without the compiled library the import works, the cpu backend says what to do, the reference runs."""
    code = """
import torch
real = torch.ops.load_library
def fail(path): raise OSError("undefined symbol: aoti_torch_something")
torch.ops.load_library = fail
import internvl_kernels as ik
x = torch.zeros(1, 2, 1, 8)
assert ik.prefix_attention(x, x, x, backend="reference").shape == x.shape
ik.prefix_attention(x, x, x)
"""
    done = in_a_process(code)
    assert done.returncode == 1
    assert "NotImplementedError" in done.stderr and "undefined symbol" in done.stderr and "make build" in done.stderr
