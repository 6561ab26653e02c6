"""PyTorch's side of the Triton operators, and that they reject what the compiled ones reject, in the same words."""

import functools

import pytest
import torch
from internvl_kernels import backends, clip_qk_layernorm, prefix_attention, registration, variables
from internvl_kernels.testing import Case, build, run
from internvl_kernels.triton_kernels import ops
from torch.utils.checkpoint import checkpoint

from tests import test_errors as errors

OPS, COMPILED = torch.ops.internvl_triton, torch.ops.internvl
CASE = Case(1, 5, 9, 2, 1, 8, prefix_len=(3,), key_range=((1, 9),), alibi="mpt", window=4)
needs_library = pytest.mark.skipif(bool(registration.LIBRARY_ERROR), reason=str(registration.LIBRARY_ERROR))


def arguments(case=CASE, requires_grad=True):
    inputs = build(case)
    leaves = [t.nan_to_num(0.5).detach().requires_grad_(requires_grad) for t in (inputs.q, inputs.k, inputs.v)]
    slopes = inputs.alibi_slopes.requires_grad_(requires_grad)
    return leaves, {**inputs.mask, "softmax_scale": inputs.softmax_scale, "alibi_slopes": slopes}


def test_opcheck():
    leaves, terms = arguments()
    torch.library.opcheck(OPS.prefix_attn.default, tuple(leaves), terms)
    qkv = torch.randn(2, 5, 12 + 2 * 6, requires_grad=True)
    parameters = [torch.randn(width, requires_grad=True) for width in (12, 12, 6, 6)]
    torch.library.opcheck(OPS.clip_qk_layernorm.default, (qkv, 12, 6, 1.5, *parameters, 1e-5))


@pytest.mark.slow
def test_opcheck_of_the_backward():
    leaves, terms = arguments(requires_grad=False)
    out, lse = OPS.prefix_attn(*leaves, **terms)
    for grad_lse in (None, torch.randn_like(lse)):
        given = (torch.randn_like(out), grad_lse, *leaves, out, lse)
        torch.library.opcheck(OPS.prefix_attn_backward.default, given, terms)
    qkv = torch.randn(2, 5, 12 + 2 * 6, requires_grad=True)
    torch.library.opcheck(OPS.clip_qk_layernorm.default, (qkv, 12, 6, 1.5, *[None] * 4, 1e-5))


def test_compile_without_recompiling():
    """One graph, forward and backward, for every batch and length."""
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.backends.registry.lookup_backend("aot_eager")(graph, example_inputs)

    def step(q, k, v, prefix, slopes):
        out, lse = prefix_attention(q, k, v, prefix_len=prefix, alibi_slopes=slopes, return_lse=True, backend="triton")
        return out.float().square().sum() + lse.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
    for batch, seqlen_q, seqlen_k in ((2, 9, 20), (3, 7, 17), (4, 5, 12)):
        leaves = [
            torch.randn(batch, s, h, 8, requires_grad=True) for s, h in ((seqlen_q, 2), (seqlen_k, 1), (seqlen_k, 1))
        ]
        slopes, prefix = torch.rand(2, requires_grad=True), torch.arange(batch, dtype=torch.int32)
        found = torch.autograd.grad(compiled(*leaves, prefix, slopes), (*leaves, slopes))
        wanted = torch.autograd.grad(step(*leaves, prefix, slopes), (*leaves, slopes))
        assert all(map(torch.equal, found, wanted))
    assert len(graphs) <= 2, len(graphs)  # the first call may specialise what the second makes symbolic


def test_export_checkpoint_and_autocast():
    class Module(torch.nn.Module):
        def forward(self, qkv, weight):
            q, k, v = clip_qk_layernorm(qkv, 16, 8, 2.0, weight, None, weight[:8], None, backend="triton")
            q, k, v = q.unflatten(-1, (2, 8)), k.unflatten(-1, (1, 8)), v.unflatten(-1, (1, 8))
            return prefix_attention(q, k, v, backend="triton")

    qkv, weight = torch.randn(2, 10, 32, requires_grad=True), torch.rand(16)
    module = Module()
    program = torch.export.export(
        module, (qkv, weight), dynamic_shapes=({0: torch.export.Dim("b", min=2, max=9)}, None)
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"internvl_triton.prefix_attn.default", "internvl_triton.clip_qk_layernorm.default"} <= targets
    plain = module(qkv, weight)
    assert torch.equal(program.module()(qkv, weight), plain)
    (wanted,) = torch.autograd.grad(plain.square().sum(), qkv)
    again = checkpoint(functools.partial(module, weight=weight), qkv, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), qkv)[0], wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = torch.randn(1, 5, 2, 8)
        out, lse = prefix_attention(q, q, q, alibi_slopes=torch.rand(2), return_lse=True, backend="triton")
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


def test_gradients_only_where_asked():
    inputs = build(Case(1, 6, 6, 2, 1, 8, alibi="random"))
    whole = run(ops.prefix_attn, inputs)
    slopes = inputs.alibi_slopes.detach()
    q = inputs.q.detach().requires_grad_()
    out, lse = ops.prefix_attn(q, inputs.k, inputs.v, alibi_slopes=slopes)
    ((out * inputs.grad_out).sum() + (lse * inputs.grad_lse).sum()).backward()
    assert torch.equal(q.grad, whole["dq"])
    with torch.no_grad():
        assert not ops.prefix_attn(q, inputs.k, inputs.v)[0].requires_grad
    q = inputs.q.detach().requires_grad_()
    (dq,) = torch.autograd.grad(ops.prefix_attn(q, inputs.k, inputs.v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dq.sum().backward()


def message(call, given):
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        call(**given)
    return str(caught.value)


@needs_library
@pytest.mark.parametrize("name", errors.ATTENTION | errors.RAW_ATTENTION)
def test_prefix_attn_rejects_in_the_same_words(name):
    if "meta" in name:  # they reach a fake kernel, and not the checks
        pytest.skip("fake kernels are shared")
    given = (errors.ATTENTION | errors.RAW_ATTENTION)[name][0]()
    assert message(OPS.prefix_attn, given) == message(COMPILED.prefix_attn, given)


@needs_library
@pytest.mark.parametrize("name", errors.NORM | errors.RAW_NORM)
def test_clip_qk_layernorm_rejects_in_the_same_words(name):
    if "meta" in name:
        pytest.skip("fake kernels are shared")
    given = (errors.NORM | errors.RAW_NORM)[name][0]()
    assert message(OPS.clip_qk_layernorm, given) == message(COMPILED.clip_qk_layernorm, given)


@needs_library
@pytest.mark.parametrize("name", errors.ATTENTION_BACKWARD)
def test_prefix_attn_backward_rejects(name):
    make, words = errors.ATTENTION_BACKWARD[name]
    rand = errors.rand
    good = {
        "grad_out": rand(2, 3, 4, 8),
        "grad_lse": None,
        **errors.qkv(),
        "out": rand(2, 3, 4, 8),
        "lse": rand(2, 4, 3),
    }
    errors.rejects(OPS.prefix_attn_backward, lambda: good | make(), words)


@needs_library
@pytest.mark.parametrize("name", errors.NORM_BACKWARD)
def test_clip_qk_layernorm_backward_rejects(name):
    make, words = errors.NORM_BACKWARD[name]
    good = {f"grad_{n}": errors.rand(3, width) for n, width in (("q", 4), ("k", 3), ("v", 3))}
    weights = {"q_weight": errors.rand(4), "k_weight": errors.rand(3)}
    good |= {"qkv": errors.rand(3, 10), "q_width": 4, "k_width": 3, "clip": None, **weights}
    errors.rejects(OPS.clip_qk_layernorm_backward, lambda: good | {"statistics": errors.rand(3, 4)} | make(), words)


def test_the_interpreter_is_used_only_when_asked_for():
    assert variables.triton_interpret() and not backends.BACKENDS["triton"].here()
    q = torch.zeros(1, 2, 1, 8)
    assert backends.select("prefix_attn", q) is backends.BACKENDS["cpu"].ops["prefix_attn"]
    assert backends.select("prefix_attn", q, "triton") is backends.BACKENDS["triton"].ops["prefix_attn"]
