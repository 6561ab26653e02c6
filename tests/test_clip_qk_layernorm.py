"""clip_qk_layernorm against float64, and against torch.clamp and torch.layer_norm in the same dtype."""

import itertools

import pytest
import torch
from internvl_kernels import backends, clip_qk_layernorm, reference
from internvl_kernels.testing import device_of, layernorm_bounds

BACKENDS = [name for name, backend in backends.BACKENDS.items() if name != "reference" and not backend.here()]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = ((1, 1), (2, 3), (7, 5), (8, 8), (16, 16), (31, 33), (64, 16), (768, 256), (1025, 511), (4096, 128))
CLIPS = (None, 1.5)  # representable in every dtype, so that torch.clamp compares with the same number


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def inputs(rows, q_width, k_width, dtype, parameter_dtype=None, scale=1.0, offset=0.0):
    qkv = (torch.randn(*rows, q_width + 2 * k_width) * scale + offset).to(dtype)
    widths = (q_width, q_width, k_width, k_width)
    parameters = [torch.randn(width).to(parameter_dtype or dtype) for width in widths]
    grads = [torch.randn(*rows, width).to(dtype) for width in (q_width, k_width, k_width)]
    return qkv, parameters, grads


def run(operator, qkv, q_width, k_width, clip, parameters, grads, eps=1e-5):
    """q, k, v and the gradients of qkv and of every parameter (None stays None)."""
    qkv = qkv.detach().requires_grad_()
    parameters = [p if p is None else p.detach().requires_grad_() for p in parameters]
    outputs = operator(qkv, q_width, k_width, clip, *parameters, eps)[:3]
    leaves = [qkv, *(p for p in parameters if p is not None)]
    found = iter(torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]))
    return [*(o.detach() for o in outputs), next(found), *(p if p is None else next(found) for p in parameters)]


def check(backend, qkv, q_width, k_width, clip, parameters, grads, eps=1e-5):
    device = device_of(backend)

    def there(x):
        return x if x is None else x.to(device)

    operator = backends.BACKENDS[backend].ops["clip_qk_layernorm"]
    moved = (there(qkv), q_width, k_width, clip, [there(p) for p in parameters], [there(g) for g in grads], eps)
    found = [x if x is None else x.cpu() for x in run(operator, *moved)]
    wide = [x if x is None else x.double() for x in parameters]
    wanted = run(
        reference.clip_qk_layernorm, qkv.double(), q_width, k_width, clip, wide, [g.double() for g in grads], eps
    )
    x = qkv if clip is None else qkv.clamp(-clip, clip)
    spans = ((0, q_width), (q_width, q_width + k_width), (q_width + k_width, x.shape[-1]))
    for n, (name, (begin, end)) in enumerate(zip("qkv", spans, strict=True)):
        part, grad = (t.reshape(-1, end - begin) for t in (x[..., begin:end], grads[n]))
        dx, true_dx = found[3][..., begin:end].reshape(part.shape), wanted[3][..., begin:end].reshape(part.shape)
        y, true_y = found[n].reshape(part.shape), wanted[n].reshape(part.shape)
        weight, bias = (None, None) if name == "v" else parameters[2 * n : 2 * n + 2]
        if weight is None:
            assert torch.equal(y, part) and torch.equal(dx.double(), true_dx), name
            continue
        bounds = layernorm_bounds(part, weight, bias, eps, grad)
        inside = true_dx != 0  # the clip's zeros are exact
        pairs = [("y", y, true_y), ("dx", dx, true_dx), ("dweight", found[4 + 2 * n], wanted[4 + 2 * n])]
        if bias is not None:
            pairs.append(("dbias", found[5 + 2 * n], wanted[5 + 2 * n]))
        for key, got, right in pairs:
            assert got.isfinite().all(), f"{name} {key}"
            error = (got.double() - right).abs()
            worst = (error / bounds[key]).max() if error.numel() else 0
            assert worst <= 1, f"{name} {key}: {worst:.2f} x the bound"
        if clip is not None:
            assert (dx[~inside & (qkv[..., begin:end].reshape(part.shape).abs() > clip)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_width,k_width", WIDTHS)
def test_against_float64(backend, q_width, k_width, dtype):
    for clip, parameter_dtype in itertools.product(CLIPS, {dtype, torch.float32}):
        qkv, parameters, grads = inputs((3, 11), q_width, k_width, dtype, parameter_dtype)
        check(backend, qkv, q_width, k_width, clip, parameters, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("present", list(itertools.product((0, 1, 2), repeat=2)), ids=str)
def test_missing_parameters(backend, present, dtype):
    """Each norm off, without bias, or whole."""
    qkv, parameters, grads = inputs((13,), 24, 9, dtype)
    for n, count in enumerate(present):
        parameters[2 * n + count : 2 * n + 2] = [None] * (2 - count)
    for clip in CLIPS:
        check(backend, qkv, 24, 9, clip, parameters, grads)


@pytest.mark.parametrize("rows", [(), (1,), (5, 1), (1, 7), (2, 3, 4), (257,)], ids=str)
def test_leading_dimensions(backend, rows):
    qkv, parameters, grads = inputs(rows, 12, 6, torch.float32)
    check(backend, qkv, 12, 6, 0.75, parameters, grads)


@pytest.mark.parametrize("rows", [(0,), (2, 0, 3)], ids=str)
def test_no_rows(backend, rows):
    qkv, parameters, grads = inputs(rows, 12, 6, torch.float32)
    found = run(backends.BACKENDS[backend].ops["clip_qk_layernorm"], qkv, 12, 6, 1.0, parameters, grads)
    assert [tuple(x.shape) for x in found[:4]] == [(*rows, 12), (*rows, 6), (*rows, 6), (*rows, 24)]
    assert all((x == 0).all() for x in found[4:])


@pytest.mark.parametrize("scale,offset", [(1e-3, 0), (100.0, 0), (1.0, 100.0), (1e-4, 1.0), (0.0, 3.0)], ids=str)
def test_unfriendly_rows(backend, scale, offset):
    """Small and large variance, a mean far from zero, and constant rows, where eps alone divides."""
    for dtype, eps in itertools.product(DTYPES, (1e-5, 1e-3)):
        qkv, parameters, grads = inputs((9,), 40, 17, dtype, scale=scale, offset=offset)
        check(backend, qkv, 40, 17, None, parameters, grads, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", CLIPS)
def test_against_torch_in_the_same_dtype(backend, clip, dtype):
    """What a model would write: clamp, split, layer_norm. Ours is at most as far from float64, or within the bound."""
    widths = (96, 32)
    qkv, parameters, grads = inputs((4, 50), *widths, dtype)

    def plain(qkv, q_width, k_width, clip, q_weight, q_bias, k_weight, k_bias, eps):
        x = qkv if clip is None else torch.clamp(qkv, -clip, clip)
        q, k, v = x.split([q_width, k_width, k_width], -1)
        norm = torch.nn.functional.layer_norm
        return norm(q, (q_width,), q_weight, q_bias, eps), norm(k, (k_width,), k_weight, k_bias, eps), v

    operator = backends.BACKENDS[backend].ops["clip_qk_layernorm"]
    ours, theirs = (run(f, qkv, *widths, clip, parameters, grads) for f in (operator, plain))
    exact = run(plain, qkv.double(), *widths, clip, [p.double() for p in parameters], [g.double() for g in grads])
    unit = torch.finfo(dtype).eps
    for name, a, b, right in zip(("q", "k", "v", "dqkv", "dqw", "dqb", "dkw", "dkb"), ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype == dtype
        ours_off, theirs_off = ((x.double() - right).abs().max() for x in (a, b))
        assert ours_off <= 2 * theirs_off + unit * right.abs().max(), name


def test_gradients_of_unused_outputs(backend):
    """One output alone, and parameters of the unused norm get zero."""
    operator = backends.BACKENDS[backend].ops["clip_qk_layernorm"]
    qkv, parameters, _ = inputs((6,), 10, 4, torch.float32)
    for used in range(3):
        leaves = [t.detach().requires_grad_() for t in (qkv, *parameters)]
        twins = [t.detach().double().requires_grad_() for t in (qkv, *parameters)]
        out = operator(leaves[0], 10, 4, 1.0, *leaves[1:], 1e-5)[used]
        grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        right = reference.clip_qk_layernorm(twins[0], 10, 4, 1.0, *twins[1:])[used]
        wanted = torch.autograd.grad(right.square().sum(), twins, allow_unused=True)
        for leaf, found, truth in zip(leaves, grads, wanted, strict=True):
            found, truth = (torch.zeros_like(leaf) if g is None else g for g in (found, truth))
            torch.testing.assert_close(found, truth.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(backend, dtype):
    """Slices of wider rows, transposed and expanded leading dimensions, odd offsets, strided gradients."""
    width = 20 + 2 * 11
    base = torch.randn(5, 6, width + 9).to(dtype)
    _, parameters, grads = inputs((5, 6), 20, 11, dtype)
    views = {
        "slice": base[..., 3 : 3 + width],
        "transposed": base.transpose(0, 1)[..., :width].transpose(0, 1),
        "swapped": torch.randn(6, 5, width).to(dtype).transpose(0, 1),
        "every second": torch.randn(5, 12, width).to(dtype)[:, ::2],
        "expanded": torch.randn(1, 6, width).to(dtype).expand(5, 6, width),
        "expanded rows": torch.randn(5, 1, width).to(dtype).expand(5, 6, width),
        "offset": torch.randn(1 + 5 * 6 * width).to(dtype)[1:].view(5, 6, width),
    }
    strided = [torch.randn(6, 5, g.shape[-1] + 1).to(dtype).transpose(0, 1)[..., :-1] for g in grads]
    for name, view in views.items():
        for cotangents in (grads, strided, [g[:1, :1].expand_as(g) for g in grads]):
            check(backend, view, 20, 11, 1.5, parameters, cotangents)
        assert view.shape == (5, 6, width), name


def test_summed_gradient(backend):
    """``sum().backward()`` hands over a gradient of stride 0 in every dimension."""
    operator = backends.BACKENDS[backend].ops["clip_qk_layernorm"]
    qkv, parameters, _ = inputs((4, 3), 10, 5, torch.float32)
    grads = [torch.ones(()).expand(4, 3, width) for width in (10, 5, 5)]
    whole = [g.contiguous() for g in grads]
    for a, b in zip(*(run(operator, qkv, 10, 5, 1.0, parameters, g) for g in (grads, whole)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_like_torch_clamp(backend, dtype):
    """NaN passes the clip, infinities become the bound; a row with NaN is NaN, its neighbours are not touched."""
    operator = backends.BACKENDS[backend].ops["clip_qk_layernorm"]
    for width in (5, 16, 37):
        qkv, parameters, grads = inputs((6,), width, width, dtype)
        qkv[0, 0], qkv[1, width], qkv[2, 2 * width] = torch.nan, torch.nan, torch.nan
        qkv[3, 1], qkv[4, width + 1], qkv[5, 2 * width + 1] = torch.inf, -torch.inf, torch.inf
        for given in (parameters, [None] * 4):
            found = run(operator, qkv, width, width, 1.5, given, grads)
            wanted = run(reference.clip_qk_layernorm, qkv, width, width, 1.5, given, grads)
            for a, b in zip(found[:3], wanted[:3], strict=True):
                assert torch.equal(a.isnan(), b.isnan()) and not a.isinf().any()
                torch.testing.assert_close(a, b, equal_nan=True, atol=0.05, rtol=0.05)
            assert (found[3][qkv.isinf()] == 0).all()
        for a, b in zip(operator(qkv, width, width, None, *[None] * 4, 1e-5), qkv.split(width, -1), strict=False):
            torch.testing.assert_close(a, b, equal_nan=True, atol=0, rtol=0)


def test_values_on_the_bound_keep_their_gradient(backend):
    operator = backends.BACKENDS[backend].ops["clip_qk_layernorm"]
    qkv = torch.tensor([[-2.0, -1.5, 1.5, 2.0, 0.0, 1.0]])
    dqkv = run(operator, qkv, 2, 2, 1.5, [None] * 4, [torch.ones(1, 2)] * 3)[3]
    assert dqkv.tolist() == [[0, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_every_thread_count(backend, dtype):
    operator = backends.BACKENDS[backend].ops["clip_qk_layernorm"]
    qkv, parameters, grads = inputs((700,), 130, 50, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(operator, qkv, 130, 50, 1.5, parameters, grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_python_call(backend):
    """Defaults: no clip, no norm; results are contiguous and their own memory."""
    qkv = torch.randn(3, 4, 30, device=device_of(backend))
    parts = clip_qk_layernorm(qkv, 10, 10, backend=backend)
    for part, own in zip(parts, qkv.split(10, -1), strict=True):
        assert torch.equal(part, own) and part.is_contiguous()
        assert part.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()
    weight = torch.ones(10, device=qkv.device)
    q, k, v = clip_qk_layernorm(qkv, 10, 10, 0.5, weight, None, weight, None, backend=backend)
    assert v.abs().max() <= 0.5 and q.mean(-1).abs().max() < 1e-5 and k.var(-1, correction=0).max() < 1.001
    with torch.no_grad():
        again = clip_qk_layernorm(qkv, 10, 10, 0.5, weight, None, weight, None, backend=backend)
    assert all(map(torch.equal, (q, k, v), again))
