"""clip_qk_layernorm on Triton's interpreter: the checks of tests/test_clip_qk_layernorm.py on fewer shapes."""

import itertools

import pytest
import torch
from internvl_kernels import reference
from internvl_kernels.triton_kernels import ops

from tests import test_clip_qk_layernorm as shared

DTYPES = shared.DTYPES


@pytest.mark.parametrize("widths", ((1, 1), (7, 5), (64, 16), (300, 130)))
def test_against_float64(widths):
    """Every combination of clip, weights and biases."""
    for number, (clip, has_weight, has_bias) in enumerate(itertools.product((None, 1.5), (True, False), (True, False))):
        dtype = DTYPES[number % 3]
        qkv, parameters, grads = shared.inputs((5,), *widths, dtype, (None, torch.float32)[number % 2])
        if not has_bias:
            parameters[1] = parameters[3] = None
        if not has_weight:
            parameters = [None] * 4
        shared.check("triton", qkv, *widths, clip, parameters, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype):
    """More rows than programs; strided rows and gradients; the clip's bound, NaN and infinities."""
    qkv, parameters, grads = shared.inputs((3, 40), 9, 5, dtype)
    shared.check("triton", qkv, 9, 5, 1.5, parameters, grads)
    base = torch.randn(4, 3, 30).to(dtype)
    grads = [torch.randn(3, 4, w + 1).to(dtype).transpose(0, 1)[..., :-1] for w in (9, 5, 5)]
    for view in (base[..., 3:22], base.transpose(0, 1)[..., :19].transpose(0, 1), base[:, :1, :19].expand(4, 3, 19)):
        shared.check("triton", view, 9, 5, 1.5, parameters, grads)
    shared.test_nan_and_infinity_like_torch_clamp("triton", dtype)


def test_gradients():
    shared.test_values_on_the_bound_keep_their_gradient("triton")
    shared.test_gradients_of_unused_outputs("triton")
    shared.test_summed_gradient("triton")


def test_python_call():
    shared.test_python_call("triton")


def test_same_bits_every_time_and_nothing_to_do():
    qkv, parameters, grads = shared.inputs((50,), 40, 20, torch.bfloat16)
    results = [shared.run(ops.clip_qk_layernorm, qkv, 40, 20, 1.5, parameters, grads) for _ in range(2)]
    assert all(map(torch.equal, *results))
    empty, parameters, grads = shared.inputs((0, 3), 4, 2, torch.float32)
    found = shared.run(ops.clip_qk_layernorm, empty, 4, 2, None, parameters, grads)
    wanted = shared.run(reference.clip_qk_layernorm, empty, 4, 2, None, parameters, grads)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.slow
def test_every_shape():
    for widths, dtype, clip in itertools.product(shared.WIDTHS, DTYPES, (None, 1.5)):
        shared.check(
            "triton", *shared.inputs((6,), *widths, dtype)[:1], *widths, clip, *shared.inputs((6,), *widths, dtype)[1:]
        )
