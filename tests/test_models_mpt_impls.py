"""The three implementations agree: outputs and gradients over every combination of what an MPT can be."""

import itertools

import pytest
import torch
from internvl_kernels.models.mpt import MPTConfig, MPTForCausalLM, MPTModel

from tests.largest_tensor import LargestTensor

SWITCHES = ("alibi", "prefix_lm", "padding", "segments", "clip", "qk_ln")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_config(attn_type="multihead_attention", **attn) -> MPTConfig:
    return MPTConfig(
        d_model=24,
        n_heads=6,
        n_layers=2,
        expansion_ratio=2,
        max_seq_len=32,
        vocab_size=50,
        attn_config={"attn_type": attn_type, **attn},
        init_config={"name": "baseline_", "init_std": 0.3, "init_div_is_residual": False},
    )


def masks(batch, length, prefix, padding, segments):
    """Keyword masks with holes in the prefix, padding on both sides and inside, and interleaved segments."""
    given = {}
    if prefix:
        mask = torch.zeros(batch, length, dtype=torch.bool)
        mask[0, : length // 2], mask[1, [1, 2, length - 2]] = True, True
        given["prefix_mask"] = mask
    if padding:
        mask = torch.ones(batch, length, dtype=torch.bool)
        mask[0, -2:], mask[1, [0, 4]] = False, False
        given["attention_mask"] = mask
    if segments:
        given["sequence_id"] = torch.tensor([[0] * 4 + [1] * (length - 4), [3, 5] * (length // 2) + [5] * (length % 2)])
    return given


@pytest.mark.parametrize("attn_type", ["multihead_attention", "multiquery_attention"])
@pytest.mark.parametrize("switches", list(itertools.product([False, True], repeat=len(SWITCHES))), ids=str)
def test_implementations_agree(attn_type, switches):
    on = dict(zip(SWITCHES, switches, strict=True))
    config = tiny_config(
        attn_type,
        alibi=on["alibi"],
        prefix_lm=on["prefix_lm"],
        attn_uses_sequence_id=on["segments"],
        clip_qkv=0.8 if on["clip"] else None,
        qk_ln=on["qk_ln"],
    )
    model = MPTModel(config).eval()
    length = 9
    given = masks(2, length, on["prefix_lm"], on["padding"], on["segments"])
    rows = given.get("attention_mask", torch.ones(2, length, dtype=torch.bool))
    ids = torch.randint(0, 50, (2, length))
    cotangent = torch.randn(2, length, 24) * rows[..., None]
    results = {}
    for impl in ("torch", "flash", "triton"):
        model.set_attn_impl(impl)
        model.zero_grad(set_to_none=True)
        hidden = model(ids, **given).last_hidden_state
        (hidden * cotangent).sum().backward()
        results[impl] = (hidden.detach()[rows], {n: p.grad.clone() for n, p in model.named_parameters()})
    hidden, grads = results["torch"]
    for impl in ("flash", "triton"):
        torch.testing.assert_close(results[impl][0], hidden, atol=2e-5, rtol=1e-4)
        for name, grad in results[impl][1].items():
            atol = 2e-5 * max(1.0, float(grads[name].abs().max()))  # sums of many terms: relative to the largest
            torch.testing.assert_close(grad, grads[name], atol=atol, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def largest_of_a_step(impl, prefix, length):
    config = MPTConfig(
        d_model=16,
        n_heads=2,
        n_layers=1,
        expansion_ratio=1,
        max_seq_len=length,
        vocab_size=8,
        attn_config={"alibi": True, "prefix_lm": prefix, "attn_uses_sequence_id": True, "qk_ln": True, "clip_qkv": 1.0},
    )
    model = MPTModel(config).eval()
    model.set_attn_impl(impl)
    given = masks(2, length, prefix, True, True)
    with LargestTensor() as largest:
        model(torch.randint(0, 8, (2, length)), **given).last_hidden_state.sum().backward()
    return largest.numel


@pytest.mark.parametrize("prefix", [False, True])
def test_fused_paths_build_nothing_quadratic(prefix):
    length = 1024
    for impl in ("flash", "triton"):
        assert largest_of_a_step(impl, prefix, length) < length * length // 4
    assert largest_of_a_step("torch", prefix, length) >= length * length  # the measure sees what it should


def test_dense_bias_covers_the_current_length_only():
    config = tiny_config(alibi=True, prefix_lm=True, attn_impl="torch")
    config.max_seq_len = 4096
    model = MPTModel(config).eval()
    with LargestTensor() as largest:
        model(torch.randint(0, 50, (2, 9)), prefix_mask=torch.ones(2, 9))
    assert largest.numel < 4096


@pytest.mark.parametrize("impl", ["torch", "flash", "triton"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16(impl, how):
    config = tiny_config("multiquery_attention", alibi=True, prefix_lm=True, qk_ln=True, clip_qkv=2.0)
    model = MPTForCausalLM(config)
    model.set_attn_impl(impl)
    ids = torch.randint(0, 50, (2, 12))
    given = {"prefix_mask": torch.ones(2, 12).tril(5), "attention_mask": torch.ones(2, 12), "labels": ids}
    exact = model(ids, **given)
    if how == "weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        low = model(ids, **given)
    low.loss.backward()
    scale = exact.logits.std()
    assert (low.logits.float() - exact.logits).abs().max() < 0.2 * scale
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_no_graph_break():
    """The fused path is one graph, in training and for another length too."""
    model = MPTModel(tiny_config("multiquery_attention", alibi=True, prefix_lm=True, qk_ln=True, clip_qkv=2.0)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 13):
        ids = torch.randint(0, 50, (2, length))
        given = masks(2, length, True, False, False) | {
            "attention_mask": torch.ones(2, length).index_fill(1, torch.tensor([length - 1]), 0)
        }
        want, got = model(ids, **given).last_hidden_state, compiled(ids, **given).last_hidden_state
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
        grads = [
            torch.autograd.grad(hidden.square().sum(), model.blocks[0].attn.Wqkv.weight)[0] for hidden in (want, got)
        ]
        torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
