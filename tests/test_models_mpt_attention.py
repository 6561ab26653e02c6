"""MPT attention functions and modules: dense biases read back, layouts, refusals."""

import pytest
import torch
from internvl_kernels.models.mpt import attention
from internvl_kernels.models.mpt.attention import AttnBias, MultiheadAttention, MultiQueryAttention

NEG = torch.finfo(torch.float32).min
FUSED = {"flash": attention.flash_attn_fn, "triton": attention.triton_flash_attn_fn}
eager = attention.scaled_multihead_dot_product_attention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def original_bias(n_heads, max_seq_len, kind, length, padding=None, dtype=torch.float32):
    """A dense bias assembled step by step as the original model does, for ``length`` tokens."""
    causal = kind != "prefix"
    shape = attention.attn_bias_shape("torch", n_heads, max_seq_len, True, kind == "prefix", causal, kind == "segments")
    bias = attention.build_attn_bias("torch", torch.zeros(shape, dtype=dtype), n_heads, max_seq_len, causal, True)
    lowest = torch.finfo(dtype).min
    if kind == "prefix":
        prefix = torch.zeros(2, length, dtype=torch.bool)
        prefix[0, :4], prefix[1, [0, 2, 5]] = True, True
        seen = torch.ones(length, length, dtype=torch.bool).tril() | prefix[:, None, :]
        bias = bias[..., :length, :length].masked_fill(~seen[:, None], lowest)
    elif kind == "segments":
        ids = torch.tensor([[0] * 3 + [1] * (length - 3), [0] * 5 + [2] * 2 + [7] * (length - 7)])
        same = ids[:, :, None] == ids[:, None, :]
        bias = bias[..., :length, :length].masked_fill(~same[:, None], lowest)
    else:
        bias = bias[..., -length:]
    if padding is not None:
        bias = bias.masked_fill(~padding[:, None, None, :], lowest)
    return bias, causal


@pytest.mark.parametrize("fn", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("n_heads", [4, 6, 12])
@pytest.mark.parametrize("kind", ["causal", "prefix", "segments"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seqlen_q", [11, 3, 1])
def test_dense_bias_is_read_back(fn, n_heads, kind, padded, seqlen_q):
    length = 11
    padding = None
    if padded:
        padding = torch.ones(2, length, dtype=torch.bool)
        padding[0, -2:], padding[1, 4] = False, False
    bias, causal = original_bias(n_heads, 16, kind, length, padding)
    q = torch.randn(2, seqlen_q, n_heads * 8)
    k, v = torch.randn(2, 2, length, n_heads * 8)
    want, _, _ = eager(q, k, v, n_heads, attn_bias=bias, is_causal=causal)
    got, _, _ = fn(q, k, v, n_heads, attn_bias=bias, is_causal=causal)
    rows = torch.ones(2, length, dtype=torch.bool) if padding is None else padding
    rows = rows[:, -seqlen_q:]
    torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_bf16_bias_is_read_back_as_the_exact_slopes(full):
    bias = attention.build_alibi_bias(12, 40, full, dtype=torch.bfloat16)
    q, k, v = torch.randn(3, 2, 40, 12 * 8)
    exact = AttnBias(alibi_slopes=attention.gen_slopes(12).flatten())
    got, _, _ = attention.flash_attn_fn(q, k, v, 12, attn_bias=bias, is_causal=not full)
    want, _, _ = attention.flash_attn_fn(q, k, v, 12, attn_bias=exact, is_causal=not full)
    torch.testing.assert_close(got, want, atol=0, rtol=0)


def test_key_padding_mask_and_bias_combine():
    q, k, v = torch.randn(3, 2, 9, 32)
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, 6:] = False
    bias = attention.build_alibi_bias(4, 9, dtype=torch.float32)
    with pytest.warns(UserWarning, match="key_padding_mask"):
        want, _, _ = eager(q, k, v, 4, attn_bias=bias, key_padding_mask=padding, is_causal=True)
    got, _, _ = attention.flash_attn_fn(q, k, v, 4, attn_bias=bias, key_padding_mask=padding, is_causal=True)
    torch.testing.assert_close(got[padding], want[padding], atol=1e-5, rtol=1e-4)
    twice = AttnBias(alibi_slopes=attention.gen_slopes(4).flatten(), key_padding_mask=padding.roll(1, 1))
    got, _, _ = attention.flash_attn_fn(q, k, v, 4, attn_bias=twice, key_padding_mask=padding, is_causal=True)
    once = AttnBias(alibi_slopes=twice.alibi_slopes, key_padding_mask=padding & padding.roll(1, 1))
    want, _, _ = attention.flash_attn_fn(q, k, v, 4, attn_bias=once, is_causal=True)
    torch.testing.assert_close(got, want, atol=0, rtol=0)
    structured = AttnBias(
        alibi_slopes=attention.gen_slopes(4).flatten(), key_range=torch.tensor([[2, 9], [0, 9]], dtype=torch.int32)
    )
    both, _, _ = attention.flash_attn_fn(q, k, v, 4, attn_bias=structured, key_padding_mask=padding, is_causal=True)
    dense, _, _ = eager(q, k, v, 4, attn_bias=structured.with_padding(padding), is_causal=True)
    torch.testing.assert_close(both[padding][2:], dense[padding][2:], atol=1e-5, rtol=1e-4)
    assert not both[0, :2].any()  # nothing visible: 0


@pytest.mark.parametrize(
    ("bias", "is_causal"),
    [
        (torch.randn(1, 4, 1, 9), True),
        (torch.randn(1, 4, 9, 9), True),
        (attention.build_alibi_bias(4, 9, dtype=torch.float32), False),  # row form without a causal mask
        (attention.build_alibi_bias(4, 9, True, dtype=torch.float32).index_fill(3, torch.tensor([3]), 1.0), True),
        (torch.zeros(1, 4, 9, 9).index_fill(1, torch.tensor([2]), NEG), True),  # one head masked
        (torch.zeros(1, 1, 9, 9).masked_fill(torch.rand(9, 9) > 0.5, NEG), False),  # no mask of the kernels
    ],
    ids=["random_row", "random_full", "row_form_not_causal", "alibi_plus", "per_head_mask", "random_mask"],
)
@pytest.mark.parametrize("fn", FUSED.values(), ids=FUSED)
def test_other_dense_biases_are_refused(fn, bias, is_causal):
    q, k, v = torch.randn(3, 2, 9, 32)
    with pytest.raises(NotImplementedError, match="pass AttnBias"):
        fn(q, k, v, 4, attn_bias=bias, is_causal=is_causal)


@pytest.mark.parametrize("fn", FUSED.values(), ids=FUSED)
def test_refusals_name_the_reason(fn):
    q, k, v = torch.randn(3, 1, 5, 32)
    with pytest.raises(NotImplementedError, match="dropout"):
        fn(q, k, v, 4, dropout_p=0.1, training=True)
    with pytest.raises(NotImplementedError, match="needs_weights"):
        fn(q, k, v, 4, needs_weights=True)
    with pytest.raises(NotImplementedError, match="gradient"):
        fn(q, k, v, 4, attn_bias=attention.build_alibi_bias(4, 5, dtype=torch.float32).requires_grad_())
    with pytest.raises(RuntimeError, match="attn_bias has shape"):
        fn(q, k, v, 4, attn_bias=torch.randn(1, 4, 1, 3))
    with pytest.raises(ValueError, match="past_key_value"):
        fn(q, k, v, 4, past_key_value=(torch.randn(1, 4, 8, 2), torch.randn(1, 4, 2, 8)))
    with pytest.raises(NotImplementedError, match="float64"):
        fn(q.double(), k.double(), v.double(), 4)
    fn(q, k, v, 4, dropout_p=0.1, training=False)  # eval: dropout has no effect


def test_unknown_implementation_is_a_value_error():
    with pytest.raises(ValueError, match="'xla'; allowed: 'torch', 'flash', 'triton'"):
        MultiheadAttention(32, 4, attn_impl="xla")


@pytest.mark.parametrize("cls", [MultiheadAttention, MultiQueryAttention])
@pytest.mark.parametrize("impl", ["flash", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_module_equals_eager_in_each_dtype(cls, impl, dtype):
    eager_module = cls(48, 6, "torch", clip_qkv=1.5, qk_ln=True).to(dtype)
    module = cls(48, 6, impl, clip_qkv=1.5, qk_ln=True).to(dtype)
    module.load_state_dict(eager_module.state_dict())
    x = torch.randn(2, 13, 48, dtype=dtype)
    bias = AttnBias(alibi_slopes=attention.gen_slopes(6).flatten(), prefix_len=torch.tensor([5, 0], dtype=torch.int32))
    got, _, _ = module(x, attn_bias=bias, is_causal=False)
    want, _, _ = eager_module(x, attn_bias=bias, is_causal=False)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_projection_reaches_the_kernel_without_copies(monkeypatch):
    """Without clip and norm q, k and v are views of the fused projection."""
    from internvl_kernels.models.mpt import fused

    seen = []
    kernel = fused.prefix_attention

    def record(q, k, v, **kwargs):
        seen.append((q, k, v))
        return kernel(q, k, v, **kwargs)

    monkeypatch.setattr(fused, "prefix_attention", record)
    for cls, width in ((MultiheadAttention, 96), (MultiQueryAttention, 48)):
        cls(32, 4, "flash")(torch.randn(2, 7, 32))
        q, k, v = seen.pop()
        assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        assert q.stride(1) == k.stride(1) == width


def test_rows_without_a_visible_key_are_zero_and_padding_never_matters():
    module = MultiheadAttention(32, 4, "triton", qk_ln=True)
    x = torch.randn(2, 8, 32)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = False
    clean, _, _ = module(x, attention_mask=mask)
    torch.testing.assert_close(clean[0, :3], module.out_proj.bias.expand(3, 32))
    x[0, :3] = float("nan")
    dirty, _, _ = module(x, attention_mask=mask)
    torch.testing.assert_close(dirty[mask], clean[mask])
