"""Boolean key masks: compact where they describe one prefix and one range, flags otherwise, the same meaning always."""

import itertools

import pytest
import torch
from internvl_kernels import masks, prefix_attention, registration, semantics

BITS = {n: list(itertools.product((False, True), repeat=n)) for n in range(6)}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def meaning(shape, bidirectional=None, real=None, prefix_len=None, key_range=None):
    """valid and bidirectional of each key, from the masks and terms as given."""
    j = torch.arange(shape[1])
    valid = torch.ones(shape, dtype=torch.bool) if real is None else real.bool()
    if key_range is not None:
        valid = (j >= key_range[:, :1]) & (j < key_range[:, 1:])
    opened = torch.zeros(shape, dtype=torch.bool) if bidirectional is None else bidirectional.bool()
    if prefix_len is not None:
        opened = j < prefix_len[:, None]
    return valid, opened & valid


def found(shape, terms):
    """The same from what ``key_terms`` made."""
    if terms.key_flags is None:
        return meaning(shape, prefix_len=terms.prefix_len, key_range=terms.key_range)
    assert terms.prefix_len is None and terms.key_range is None
    assert terms.key_flags.dtype == torch.uint8 and tuple(terms.key_flags.shape) == shape
    valid = semantics.flag_valid(terms.key_flags)
    return valid, semantics.flag_bidirectional(terms.key_flags) & valid


def check(shape, bidirectional=None, real=None, prefix_len=None, key_range=None):
    terms = masks.key_terms(bidirectional, real, prefix_len, key_range, shape)
    given = (bidirectional, real, prefix_len, key_range, terms)
    for a, b in zip(found(shape, terms), meaning(shape, bidirectional, real, prefix_len, key_range), strict=True):
        assert torch.equal(a.expand(shape), b.expand(shape)), given
    if terms.key_range is not None:  # what the operator accepts
        assert (terms.key_range[:, 0] >= 0).all() and (terms.key_range[:, 0] <= terms.key_range[:, 1]).all(), given
    for term in (terms.prefix_len, terms.key_range):
        assert term is None or term.dtype == torch.int32
    return terms


@pytest.mark.parametrize("seqlen_k", range(1, 6))
def test_every_pattern(seqlen_k):
    """Each mask alone, and all pairs of them."""
    shape = (1, seqlen_k)
    for bits in BITS[seqlen_k]:
        mask = torch.tensor([bits])
        terms = check(shape, bidirectional=mask)
        prefix = sum(bits)
        assert (terms.key_flags is None) == (list(bits) == [j < prefix for j in range(seqlen_k)]), bits
        terms = check(shape, real=mask)
        ones = [j for j, bit in enumerate(bits) if bit]
        assert (terms.key_flags is None) == (not ones or ones == list(range(ones[0], ones[-1] + 1))), bits
    for opened, real in itertools.product(BITS[min(seqlen_k, 4)], repeat=2):
        check((1, len(real)), torch.tensor([opened]), torch.tensor([real]))


@pytest.mark.parametrize("seqlen_k", (1, 3, 4))
def test_a_mask_beside_a_compact_term(seqlen_k):
    for bits in BITS[seqlen_k]:
        mask = torch.tensor([bits])
        for prefix in (-1, 0, 1, seqlen_k, seqlen_k + 2):
            check((1, seqlen_k), real=mask, prefix_len=int32(prefix))
        for start, end in itertools.product(range(seqlen_k + 1), range(seqlen_k + 3)):
            if start <= end:
                check((1, seqlen_k), bidirectional=mask, key_range=int32([start, end]))


def test_what_padding_says_does_not_matter():
    """A tokenizer marks the prompt and pads on the left: bits on padding do not spoil the prefix."""
    real = torch.tensor([[0, 0, 1, 1, 1, 1]])
    for opened in ([[0, 0, 1, 1, 0, 0]], [[1, 1, 1, 1, 0, 0]], [[1, 0, 1, 1, 0, 0]]):
        terms = check((1, 6), torch.tensor(opened), real)
        assert terms.key_flags is None and terms.prefix_len.tolist() == [4] and terms.key_range.tolist() == [[2, 6]]


def test_one_ragged_row_makes_all_rows_flags():
    real = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0]])
    assert check((2, 4), real=real).key_flags is not None
    assert check((2, 4), real=real[:1].expand(2, 4)).key_flags is None


@pytest.mark.parametrize("dtype", (torch.bool, torch.uint8, torch.int32, torch.int64))
def test_any_integer_dtype(dtype):
    """Non-zero is true, whatever the number."""
    mask = torch.tensor([[3, 1, 0, 0], [0, 2, 7, 1]]).to(dtype)
    terms = check((2, 4), real=mask)
    assert terms.key_range.tolist() == [[0, 2], [1, 4]]


def test_no_keys_and_no_batch():
    for shape in ((2, 0), (0, 3), (0, 0)):
        mask = torch.zeros(shape, dtype=torch.bool)
        for given in ((mask, None), (None, mask), (mask, mask)):
            check(shape, *given)


def test_masks_on_a_device_are_not_read():
    """Meta tensors have no data: whoever read them would fail."""
    mask = torch.ones(2, 5, dtype=torch.bool, device="meta")
    for bidirectional, real in ((mask, None), (None, mask), (mask, mask)):
        terms = masks.key_terms(bidirectional, real, None, None, (2, 5))
        assert terms.key_flags.device.type == "meta" and terms.key_flags.shape == (2, 5)


def test_a_subclass_is_not_read():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        mask = torch.ones(2, 5, dtype=torch.bool)
        terms = masks.key_terms(mask, mask, None, None, (2, 5))
    assert terms.key_flags.shape == (2, 5)


@pytest.mark.skipif(bool(registration.LIBRARY_ERROR), reason=str(registration.LIBRARY_ERROR))
def test_prefix_attention_takes_the_masks():
    """Boolean masks and the terms they stand for give the same bits; holes agree with the reference."""
    q, k, v = (torch.randn(2, 12, h, 8) for h in (4, 2, 2))
    j = torch.arange(12)
    opened, real = (j < int32(5, 12)[:, None]), (j >= int32(2, 0)[:, None]) & (j < int32(12, 9)[:, None])
    key_range, prefix_len = int32([2, 12], [0, 9]), int32(5, 12)
    wanted = prefix_attention(q, k, v, prefix_len=prefix_len, key_range=key_range)
    for terms in (
        {"bidirectional_mask": opened, "key_padding_mask": real},
        {"bidirectional_mask": opened.long(), "key_range": key_range},
        {"prefix_len": prefix_len, "key_padding_mask": real.to(torch.uint8)},
    ):
        assert torch.equal(prefix_attention(q, k, v, **terms), wanted), terms
    holes = torch.rand(2, 2, 12) > 0.4
    terms = {"bidirectional_mask": holes[0], "key_padding_mask": holes[1], "return_lse": True}
    for a, b in zip(
        prefix_attention(q, k, v, **terms), prefix_attention(q, k, v, backend="reference", **terms), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(bool(registration.LIBRARY_ERROR), reason=str(registration.LIBRARY_ERROR))
def test_integer_prefix():
    """One int for every row; 0 is causal, anything beyond the keys is full attention."""
    q = torch.randn(3, 7, 2, 8)
    for prefix in (-1, 0, 4, 7, 10**6):
        wanted = prefix_attention(q, q, q, prefix_len=int32(prefix, prefix, prefix))
        assert torch.equal(prefix_attention(q, q, q, prefix_len=prefix), wanted)
    assert torch.equal(prefix_attention(q, q, q, prefix_len=0), prefix_attention(q, q, q))
    assert torch.equal(
        prefix_attention(q, q, q, prefix_len=4, key_padding_mask=torch.ones(3, 7, dtype=torch.bool)),
        prefix_attention(q, q, q, prefix_len=4),
    )


def test_key_flags_are_both_masks_at_once():
    q, k, v = (torch.randn(2, 7, 2, 8) for _ in range(3))
    bidirectional, real = torch.rand(2, 7) < 0.4, torch.rand(2, 7) < 0.7
    want = prefix_attention(q, k, v, bidirectional_mask=bidirectional, key_padding_mask=real)
    flags = (real + 2 * bidirectional).to(torch.uint8)
    assert torch.equal(prefix_attention(q, k, v, key_flags=flags), want)
    with pytest.raises(ValueError, match="key_flags and boolean masks were both given"):
        prefix_attention(q, k, v, key_flags=flags, key_padding_mask=real)
