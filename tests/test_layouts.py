"""Any strides with a contiguous last dimension, without a copy by the caller."""

import dataclasses
import mmap

import pytest
import torch
from internvl_kernels import backends, prefix_attention
from internvl_kernels.testing import Case, build, correctness_gate, device_of, random_case, run

BACKENDS = [name for name, backend in backends.BACKENDS.items() if name != "reference" and not backend.here()]
LAYOUTS = ("fused", "bhsd", "offset", "expanded")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("seqlen_q", (1, 6, 70))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, seqlen_q, dtype):
    for head_dim in (5, 16, 40):
        case = Case(2, seqlen_q, 70, 4, 2, head_dim, dtype, prefix_len=(30, 5), alibi="mpt", layout=layout, seed=2)
        assert build(case).q.stride() != torch.empty(2, seqlen_q, 4, head_dim).stride()
        assert not correctness_gate(backend, case), repr(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_no_bit(backend, layout):
    """The same values in another layout give the same bits, forward and backward."""
    operator = backends.BACKENDS[backend].ops["prefix_attn"]
    case = random_case(4)
    inputs = build(dataclasses.replace(case, layout=layout)).to(device=device_of(backend))
    plain = dataclasses.replace(inputs, q=inputs.q.contiguous(), k=inputs.k.contiguous(), v=inputs.v.contiguous())
    a, b = run(operator, inputs, case.gradients), run(operator, plain, case.gradients)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_fused_projection_with_gradient(backend):
    """q, k, v cut from one grouped-query projection: the gradient arrives in one tensor."""
    heads, heads_kv, dim = 6, 2, 8
    fused = torch.randn(2, 33, (heads + 2 * heads_kv) * dim, device=device_of(backend))
    prefix = torch.tensor([10, 33], dtype=torch.int32, device=fused.device)

    def attend(x, name):
        q, k, v = x.split([heads * dim, heads_kv * dim, heads_kv * dim], -1)
        q, k, v = q.unflatten(-1, (heads, dim)), k.unflatten(-1, (heads_kv, dim)), v.unflatten(-1, (heads_kv, dim))
        return prefix_attention(q, k, v, prefix_len=prefix, backend=name)

    grads = []
    for name, x in ((backend, fused.clone()), ("reference", fused.double())):
        x.requires_grad_()
        attend(x, name).square().sum().backward()
        grads.append(x.grad.double())
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_gradient_layouts(backend):
    """grad_out as autograd really makes it: transposed, expanded by sum(), sliced, and as a permuted view."""
    case = Case(2, 20, 20, 4, 2, 16, alibi="mpt")
    inputs = build(case).to(device=device_of(backend))
    operator = backends.BACKENDS[backend].ops["prefix_attn"]
    wide = torch.randn(2, 20, 4, 32, device=inputs.q.device)
    gradients = {
        "transposed": torch.randn(2, 4, 20, 16, device=inputs.q.device).transpose(1, 2),
        "expanded": torch.ones((), device=inputs.q.device).expand(2, 20, 4, 16),
        "one row": torch.randn(1, 1, 1, 16, device=inputs.q.device).expand(2, 20, 4, 16),
        "sliced": wide[..., 5:21],
        "last dimension strided": wide[..., ::2],
        "last dimension transposed": torch.randn(2, 20, 16, 4, device=inputs.q.device).mT,
    }
    for name, grad in gradients.items():
        assert name == "expanded" or not grad.is_contiguous()
        found, wanted = (run(operator, dataclasses.replace(inputs, grad_out=g)) for g in (grad, grad.contiguous()))
        assert all(torch.equal(found[n], wanted[n]) for n in wanted), name
    grad_lse = torch.randn(2, 20, 4, device=inputs.q.device).transpose(1, 2)
    found, wanted = (run(operator, dataclasses.replace(inputs, grad_lse=g)) for g in (grad_lse, grad_lse.contiguous()))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_strided_mask_tensors(backend):
    """Mask tensors may be views as well: columns of a table, expanded rows."""
    case = Case(3, 20, 20, 2, 2, 8, prefix_len=(3, 9, 12), key_range=((1, 20), (0, 15), (4, 9)), query_start=(0, 2, -3))
    case = dataclasses.replace(case, segments="packed", alibi="random")
    inputs = build(case).to(device=device_of(backend))
    table = torch.full((3, 50), 77, dtype=torch.int32, device=inputs.q.device)
    views = dict(inputs.mask)
    for name, at in (("prefix_len", 1), ("query_start", 3)):
        table[:, at] = inputs.mask[name]
        views[name] = table[:, at]
    table[:, 5:9:2] = inputs.mask["key_range"]
    views["key_range"] = table[:, 5:9:2]
    table[:, 10:50:2] = inputs.mask["segment_ids"]
    views["segment_ids"] = table[:, 10:50:2]
    slopes = torch.stack([inputs.alibi_slopes, inputs.alibi_slopes], 1)[:, 0]
    assert not any(views[n].is_contiguous() for n in ("prefix_len", "query_start", "key_range", "segment_ids"))
    operator = backends.BACKENDS[backend].ops["prefix_attn"]
    found = run(operator, dataclasses.replace(inputs, mask=views, alibi_slopes=slopes))
    wanted = run(operator, inputs)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    flags = dataclasses.replace(case, prefix_len=None, key_range=None, key_flags="holes")
    inputs = build(flags).to(device=device_of(backend))
    wanted = run(operator, inputs)
    inputs.mask["key_flags"] = inputs.mask["key_flags"].t().contiguous().t()
    found = run(operator, inputs)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_shared_keys_and_values(backend):
    """k and v may be the same tensor, or q as well."""
    x = torch.randn(2, 17, 3, 16, device=device_of(backend))
    grads = []
    for name, dtype in ((backend, x.dtype), ("reference", torch.float64)):
        own = x.to(dtype, copy=True).requires_grad_()
        prefix_attention(own, own, own, backend=name).square().sum().backward()
        grads.append(own.grad.double())
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_results_are_contiguous_and_inputs_untouched(backend):
    case = Case(2, 20, 30, 4, 2, 16, "bfloat16", prefix_len=(9, 30), alibi="mpt", layout="bhsd")
    inputs = build(case).to(device=device_of(backend))
    before = [t.clone() for t in (inputs.q, inputs.k, inputs.v, inputs.alibi_slopes, inputs.mask["prefix_len"])]
    results = run(backends.BACKENDS[backend].ops["prefix_attn"], inputs)
    for name, result in results.items():
        assert result.is_contiguous(), name
    after = (inputs.q, inputs.k, inputs.v, inputs.alibi_slopes, inputs.mask["prefix_len"])
    assert all(map(torch.equal, before, after))


def test_offsets_beyond_int32(backend):
    """Strides that carry an element past 2^31: 8 GiB of lazily mapped memory, of which a few rows are touched."""
    stride = 2**31 + 64
    if device_of(backend) == "cpu":
        try:
            base = torch.frombuffer(mmap.mmap(-1, 4 * stride), dtype=torch.bfloat16)
        except OSError as error:
            pytest.skip(f"no 8 GiB of address space: {error}")
    else:
        base = torch.zeros(2 * stride, dtype=torch.bfloat16, device=device_of(backend))
    k = base.as_strided((2, 3, 1, 16), (stride, 16, 16, 1))
    k.copy_(torch.randn(2, 3, 1, 16))
    q = torch.randn(2, 3, 1, 16, device=k.device).bfloat16()
    found = prefix_attention(q, k, k, backend=backend)
    assert torch.equal(found, prefix_attention(q, k.contiguous(), k.contiguous(), backend=backend))
