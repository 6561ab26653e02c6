"""PyTorch's side of the operators: opcheck, compile, export, checkpointing, autocast, fake tensors."""

import dataclasses
import functools
import itertools

import pytest
import torch
from internvl_kernels import clip_qk_layernorm, prefix_attention, registration
from internvl_kernels.testing import Case, build, random_case, run
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.skipif(bool(registration.LIBRARY_ERROR), reason=str(registration.LIBRARY_ERROR))
OPS = torch.ops.internvl

CASES = {
    "plain": Case(2, 9, 9, 4, 2, 8),
    "compact": Case(2, 5, 9, 4, 2, 8, "bfloat16", prefix_len=(3, 9), key_range=((1, 9), (0, 4)), alibi="mpt", window=4),
    "general": Case(2, 9, 9, 2, 2, 8, key_flags="holes", segments="packed", query_start=(0, 2), softmax_scale=0.3),
    "views": Case(2, 9, 9, 4, 1, 8, alibi="random", layout="fused"),
    "decode": Case(2, 1, 600, 4, 1, 8, key_range=((0, 500), (0, 2)), query_start=(499, 1), alibi="mpt"),
}


def arguments(case, requires_grad=True):
    """Positional and keyword arguments of the raw operator; no NaN, which opcheck's comparisons would meet."""
    inputs = build(case)
    leaves = [t.nan_to_num(0.5).detach().requires_grad_(requires_grad) for t in (inputs.q, inputs.k, inputs.v)]
    if case.layout != "plain":
        leaves = [t.detach().requires_grad_(requires_grad) for t in (inputs.q, inputs.k, inputs.v)]
    slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes.requires_grad_(requires_grad)
    return leaves, {**inputs.mask, "softmax_scale": inputs.softmax_scale, "alibi_slopes": slopes}


@pytest.mark.parametrize("name", CASES)
def test_opcheck_prefix_attn(name):
    leaves, terms = arguments(CASES[name])
    torch.library.opcheck(OPS.prefix_attn.default, tuple(leaves), terms)


@pytest.mark.parametrize("name", CASES)
def test_opcheck_prefix_attn_backward(name):
    leaves, terms = arguments(CASES[name], requires_grad=False)
    out, lse = OPS.prefix_attn(*leaves, **terms)
    for grad_lse in (None, torch.randn_like(lse)):
        given = (torch.randn_like(out), grad_lse, *leaves, out, lse)
        torch.library.opcheck(OPS.prefix_attn_backward.default, given, terms)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_opcheck_clip_qk_layernorm(dtype):
    qkv = torch.randn(2, 5, 12 + 2 * 6).to(dtype).requires_grad_()
    parameters = [torch.randn(width, requires_grad=True) for width in (12, 12, 6, 6)]
    for given in (parameters, [None] * 4, [parameters[0], None, None, None]):
        torch.library.opcheck(OPS.clip_qk_layernorm.default, (qkv, 12, 6, 1.5, *given, 1e-5))
    plain = (qkv.detach(), 12, 6, 1.5)
    weights = [p.detach() for p in parameters]
    q, k, v, statistics = OPS.clip_qk_layernorm(*plain, *weights, 1e-5)
    grads = [torch.randn_like(x) for x in (q, k, v)]
    for given, k_weight in ((grads, weights[2]), ([grads[0], None, None], None)):
        torch.library.opcheck(
            OPS.clip_qk_layernorm_backward.default, (*given, *plain, weights[0], k_weight, statistics)
        )


def attention_step(q, k, v, prefix_len, slopes):
    out, lse = prefix_attention(q, k, v, prefix_len=prefix_len, alibi_slopes=slopes, return_lse=True)
    return out.float().square().sum() + lse.sum()


def norm_step(qkv, weight):
    q, k, v = clip_qk_layernorm(qkv, 16, 8, 1.0, weight, None, weight[:8], None)
    return (q.sum(-1) * k.square().sum(-1)).sum() + v.square().sum()


def counting_backend(counter):
    """aot_eager that counts what it compiles."""
    from torch._dynamo.backends.registry import lookup_backend

    eager = lookup_backend("aot_eager")

    def compile_graph(graph, example_inputs):
        counter.append(graph)
        return eager(graph, example_inputs)

    return compile_graph


def test_compile_attention_without_recompiling():
    """One graph, forward and backward, for every batch and length."""
    torch._dynamo.reset()
    graphs = []
    step = torch.compile(attention_step, fullgraph=True, dynamic=True, backend=counting_backend(graphs))
    for batch, seqlen_q, seqlen_k in ((2, 9, 9), (3, 17, 17), (4, 5, 40), (2, 33, 50)):
        leaves = [
            torch.randn(batch, s, h, 8, requires_grad=True) for s, h in ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2))
        ]
        slopes = torch.rand(4, requires_grad=True)
        prefix = torch.arange(batch, dtype=torch.int32)
        found = torch.autograd.grad(step(*leaves, prefix, slopes), (*leaves, slopes))
        wanted = torch.autograd.grad(attention_step(*leaves, prefix, slopes), (*leaves, slopes))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) <= 2, f"{len(graphs)} graphs"  # query and key lengths equal, and not


def test_compile_norm_without_recompiling():
    torch._dynamo.reset()
    graphs = []
    first = 0
    step = torch.compile(norm_step, fullgraph=True, dynamic=True, backend=counting_backend(graphs))
    for rows in ((2, 9), (3, 17), (5, 4)):
        qkv, weight = torch.randn(*rows, 32, requires_grad=True), torch.randn(16, requires_grad=True)
        found = torch.autograd.grad(step(qkv, weight), (qkv, weight))
        for a, b in zip(found, torch.autograd.grad(norm_step(qkv, weight), (qkv, weight)), strict=True):
            torch.testing.assert_close(a, b)
        first = first or len(graphs)
    assert len(graphs) == first


def test_compile_with_inductor():
    """The default backend, with boolean masks that become key flags inside the graph, and no gradient."""
    torch._dynamo.reset()

    def call(q, k, real):
        return prefix_attention(q, k, k, key_padding_mask=real, window=5) * 2

    q, k = torch.randn(2, 7, 4, 8), torch.randn(2, 7, 2, 8)
    real = torch.rand(2, 7) > 0.3
    try:
        compiled = torch.compile(call, fullgraph=True)
        with torch.no_grad():
            found = compiled(q, k, real)
    except torch._dynamo.exc.BackendCompilerFailed as error:  # inductor wants a compiler for its own loops
        pytest.skip(str(error))
    torch.testing.assert_close(found, call(q, k, real))


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.Parameter(torch.rand(16))
        self.slopes = torch.nn.Parameter(torch.rand(2))

    def forward(self, qkv, prefix_len):
        q, k, v = clip_qk_layernorm(qkv, 16, 8, 2.0, self.norm, None, self.norm[:8], None)
        q, k, v = q.unflatten(-1, (2, 8)), k.unflatten(-1, (1, 8)), v.unflatten(-1, (1, 8))
        return prefix_attention(q, k, v, prefix_len=prefix_len, alibi_slopes=self.slopes)


def test_export_with_dynamic_shapes():
    module = Module()
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(
        module,
        (torch.randn(3, 10, 32), torch.zeros(3, dtype=torch.int32)),
        dynamic_shapes=({0: batch, 1: length}, {0: batch}),
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"internvl.prefix_attn.default", "internvl.clip_qk_layernorm.default"} <= targets
    for shape in ((2, 5), (5, 33)):
        qkv, prefix = torch.randn(*shape, 32), torch.arange(shape[0], dtype=torch.int32)
        torch.testing.assert_close(program.module()(qkv, prefix), module(qkv, prefix))


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_activation_checkpointing(use_reentrant):
    """Recomputed in the backward: the same bits."""
    module, grads = Module(), []
    qkv, prefix = torch.randn(2, 12, 32), torch.tensor([4, 12], dtype=torch.int32)
    for call in (module, functools.partial(checkpoint, module, use_reentrant=use_reentrant)):
        own = qkv.clone().requires_grad_()
        call(own, prefix).square().sum().backward()
        grads.append([own.grad, *(p.grad for p in module.parameters())])
        module.zero_grad(set_to_none=True)
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(dtype):
    """q, k and v in autocast's dtype; slopes and lse stay fp32; gradients come back in the leaves' dtypes."""
    q = torch.randn(2, 12, 4, 8, requires_grad=True)
    k = torch.randn(2, 12, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    slopes = torch.rand(4, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out, lse = prefix_attention(q, k, k, alibi_slopes=slopes, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    with torch.no_grad():
        plain = prefix_attention(q.to(dtype), k.to(dtype), k.to(dtype), alibi_slopes=slopes)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(prefix_attention(q, k, k, alibi_slopes=slopes), plain)
    assert torch.equal(out, plain)
    grads = torch.autograd.grad(out.float().sum() + lse.sum(), (q, k, slopes))
    assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16, torch.float32]
    with torch.autocast("cpu", enabled=False):
        assert prefix_attention(q, q, q).dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype), pytest.raises((ValueError, NotImplementedError)):
        prefix_attention(q.double(), q.double(), q.double())


def test_no_grad_gives_the_same_bits():
    for case in (CASES["compact"], CASES["general"]):
        leaves, terms = arguments(case)
        tracked = OPS.prefix_attn(*leaves, **terms)
        flags = terms.pop("key_flags"), terms.pop("query_start")
        for guard in (torch.no_grad, torch.inference_mode):
            with guard():
                plain = OPS.prefix_attn(*leaves, key_flags=flags[0], query_start=flags[1], **terms)
            assert all(map(torch.equal, tracked, plain)) and not plain[0].requires_grad
        direct = registration.prefix_attn(*leaves, key_flags=flags[0], query_start=flags[1], **terms)
        assert all(map(torch.equal, tracked, direct)) and direct[0].requires_grad


def test_gradients_only_where_asked():
    inputs = build(Case(1, 6, 6, 2, 1, 8, alibi="random"))
    tensors = [inputs.q, inputs.k, inputs.v, inputs.alibi_slopes]
    whole = run(OPS.prefix_attn, inputs)
    for wanted in itertools.product((False, True), repeat=4):
        leaves = [t.detach().requires_grad_(on) for t, on in zip(tensors, wanted, strict=True)]
        out, lse = OPS.prefix_attn(*leaves[:3], alibi_slopes=leaves[3])
        assert out.requires_grad == lse.requires_grad == any(wanted)
        if any(wanted):
            (out * inputs.grad_out).sum().add((lse * inputs.grad_lse).sum()).backward()
        for leaf, name, on in zip(leaves, ("dq", "dk", "dv", "dalibi_slopes"), wanted, strict=True):
            assert (leaf.grad is not None) == on
            assert not on or torch.equal(leaf.grad, whole[name])


def test_backward_twice_through_one_graph():
    leaves, terms = arguments(CASES["plain"])
    out, _ = OPS.prefix_attn(*leaves, **terms)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out.sum(), leaves)))


def test_second_derivatives_are_refused():
    leaves, terms = arguments(CASES["plain"])
    out, _ = OPS.prefix_attn(*leaves, **terms)
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
    qkv, weight = torch.randn(3, 32, requires_grad=True), torch.rand(16, requires_grad=True)
    (grad,) = torch.autograd.grad(norm_step(qkv, weight), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="clip_qk_layernorm: second derivatives"):
        grad.sum().backward()


def test_inputs_changed_after_the_forward_are_noticed():
    leaves, terms = arguments(CASES["plain"])
    k = leaves[1] * 1
    out, _ = OPS.prefix_attn(leaves[0], k, leaves[2], **terms)
    k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_meta_tensors():
    """Shapes, dtypes and strides without data."""
    for case in CASES.values():
        leaves, terms = arguments(case, requires_grad=False)
        real = OPS.prefix_attn(*leaves, **terms)
        moved = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in terms.items()}
        fake = OPS.prefix_attn(*(t.to("meta") for t in leaves), **moved)
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.dtype, a.stride(), a.device.type) == (b.shape, b.dtype, b.stride(), "meta")
    q, k, v, statistics = OPS.clip_qk_layernorm(torch.empty(3, 5, 20, device="meta"), 8, 6, None, *[None] * 4, 1e-5)
    assert [tuple(x.shape) for x in (q, k, v, statistics)] == [(3, 5, 8), (3, 5, 6), (3, 5, 6), (3, 5, 4)]


def test_fake_mode_allocates_nothing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(8, 2**20, 32, 128, requires_grad=True)  # 128 GiB
        out, lse = prefix_attention(q, q, q, return_lse=True)
        (out.sum() + lse.sum()).backward()
        assert q.grad.shape == q.shape


def test_state_of_the_operator_library():
    """Schemas are fixed: argument names are the Python keywords, and the arity of the results never changes."""
    names = [a.name for a in OPS.prefix_attn.default._schema.arguments]
    terms = ("prefix_len", "key_range", "query_start", "key_flags", "segment_ids", "alibi_slopes", "softmax_scale")
    assert names == ["q", "k", "v", *terms, "window"]
    assert [r.name for r in OPS.prefix_attn.default._schema.returns] == ["out", "lse"]
    assert not OPS.prefix_attn.default._schema.is_mutable


def test_random_cases_compiled():
    """The compiled graph and the eager call give the same bits, on every kind of mask."""
    torch._dynamo.reset()

    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    def call(q, k, v, **terms):
        return OPS.prefix_attn(q, k, v, **terms)

    for seed in (1, 2, 3, 5):
        case = dataclasses.replace(random_case(seed), layout="plain", gradients="both")
        found, wanted = (run(f, build(case)) for f in (call, OPS.prefix_attn))
        assert all(torch.equal(found[n].nan_to_num(), wanted[n].nan_to_num()) for n in wanted), repr(case)
