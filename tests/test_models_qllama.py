"""Q-LLaMA against recorded cases, transformers' LLaMA, and the same arithmetic written out densely in float64."""

from pathlib import Path

import pytest
import torch
from internvl_kernels.models import qllama
from internvl_kernels.models.qllama import LlamaModel, layers
from torch.nn import functional
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as TheirLlama

from tests.golden import case_ids, replay
from tests.largest_tensor import LargestTensor
from tests.qllama_models import SIZES, WIDTH, N, ids, padded_left, tiny

BANK = Path(__file__).parent / "golden_bank"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- dense float64 oracle ----


def dense_forward(model: LlamaModel, embeds, seen, vision=None, repeat_time=1, positions=None):
    """The whole inner model from its parameters; seen [B, S, S] bool; a row that sees nothing gives 0."""
    config, (batch, seqlen, _) = model.config, embeds.shape
    heads, kv_heads, hd = config.num_attention_heads, config.num_key_value_heads, model.layers[0].self_attn.head_dim

    def norm(module, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt() * module.weight

    def split(x, count):
        return x.view(batch, -1, count, hd).transpose(1, 2)

    def attend(q, k, v, visible):
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) / hd**0.5).masked_fill(~visible[:, None], -torch.inf)
        weights = torch.nan_to_num(scores.softmax(-1))
        return (weights @ v).transpose(1, 2).flatten(2)

    positions = torch.arange(seqlen)[None] if positions is None else positions
    angle = positions[..., None] / 10000.0 ** (torch.arange(0, hd, 2).double() / hd)
    angle = torch.cat([angle, angle], -1)[:, None]

    def turn(x):
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    x = embeds
    for layer in model.layers:
        y, own = norm(layer.input_layernorm, x), layer.self_attn
        q, k, v = (
            turn(split(own.q_proj(y), heads)),
            turn(split(own.k_proj(y), kv_heads)),
            split(own.v_proj(y), kv_heads),
        )
        x = x + own.o_proj(attend(q, k, v, seen))
        if layer.cross_attn is not None and vision is not None and seqlen >= config.num_query_token:
            cross, n = layer.cross_attn, config.num_query_token
            tiled = norm(cross.norm2, vision).repeat(repeat_time, 1, 1)
            q = split(cross.q_proj(norm(cross.norm1, x[:, :n])), heads)
            k, v = split(cross.k_proj(tiled), kv_heads), split(cross.v_proj(tiled), kv_heads)
            everything = torch.ones(batch, n, vision.shape[1], dtype=torch.bool)
            x = torch.cat([x[:, :n] + cross.o_proj(attend(q, k, v, everything)), x[:, n:]], 1)
        x = x + layer.mlp(norm(layer.post_attention_layernorm, x))
    return norm(model.norm, x)


def seen_of(batch, seqlen, mask=None, zero=False):
    """[B, S, S] bool, as the contract says it: causal and real, and queries see every query."""
    seen = torch.ones(seqlen, seqlen, dtype=torch.bool).tril().expand(batch, -1, -1).clone()
    if mask is not None:
        seen &= mask[:, None].bool()
    if zero:
        seen[:, :N, :N] = True
    return seen


def compare_with_dense(model, inputs, seen, repeat_time=1, **call):
    """Outputs and every gradient, in float64-made references; inputs: (embeds, vision or None)."""
    oracle = tiny(LlamaModel, num_key_value_heads=model.config.num_key_value_heads).double()
    oracle.load_state_dict(model.state_dict())
    mine, wanted = [], []
    for kind, target, result in ((torch.float32, model, mine), (torch.float64, oracle, wanted)):
        embeds, vision = (None if t is None else t.detach().to(kind).requires_grad_() for t in inputs)
        if target is model:
            method = model.forward_train if call.pop("train", False) else model.forward
            out = method(
                inputs_embeds=embeds, vision_hidden_states=vision, repeat_time=repeat_time, use_cache=False, **call
            ).last_hidden_state
        else:
            out = dense_forward(oracle, embeds, seen, vision, repeat_time)
        rows = seen.any(2)
        (out[rows] * torch.linspace(-1, 1, out[rows].numel()).view_as(out[rows])).sum().backward()
        result += [out[rows], embeds.grad, *([] if vision is None else [vision.grad])]
        result += [p.grad for p in target.parameters() if p.grad is not None]
    assert len(mine) == len(wanted)
    for got, want in zip(mine, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("case_id", [c for c in case_ids(BANK) if c.startswith("qllama_")])
def test_golden(case_id):
    outcomes = [outcome for _, outcome in replay(BANK, case_id)]
    assert outcomes
    assert not [f"{outcome.call}: {outcome.problems}" for outcome in outcomes if outcome.problems]


# ---- self-attention and cross attention ----


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("zero", [False, True], ids=["causal", "zero_mask"])
@pytest.mark.parametrize("padding", [None, "right", "left", "in_block", "hole"])
def test_forward_and_gradients_equal_dense_attention(kv_heads, zero, padding):
    model = tiny(LlamaModel, num_key_value_heads=kv_heads)
    batch, seqlen = 3, 11
    mask = None if padding is None else torch.ones(batch, seqlen, dtype=torch.long)
    if padding == "right":
        mask[1, 8:] = mask[2, 10:] = 0
    elif padding == "left":
        mask[0, :2] = mask[2, :7] = 0
    elif padding == "in_block":
        mask[0, 3] = mask[1, :2] = 0
    elif padding == "hole":
        mask[0, 7:9] = 0
    inputs = (torch.randn(batch, seqlen, 32), torch.randn(batch, 5, WIDTH))
    compare_with_dense(
        model, inputs, seen_of(batch, seqlen, mask, zero), attention_mask=mask, use_zero_attention_mask=zero
    )


@pytest.mark.parametrize("images,repeat_time", [(1, 3), (2, 2), (3, 1)])
def test_repeat_time_equals_tiled_vision_states(images, repeat_time):
    inputs = (torch.randn(images * repeat_time, 9, 32), torch.randn(images, 5, WIDTH))
    seen = seen_of(images * repeat_time, 9, zero=True)
    compare_with_dense(tiny(LlamaModel), inputs, seen, repeat_time, use_zero_attention_mask=True)


def test_repeat_time_copies_no_keys(monkeypatch):
    """Three texts of two images attend to keys of batch 2, in the memory that the projection wrote."""
    attention = tiny(LlamaModel).layers[0].cross_attn
    projected, attended = [], []
    attention.k_proj.register_forward_hook(lambda _m, _i, out: projected.append(out))

    def spy(q, k, v, **terms):
        attended.append((q, k, v))
        return prefix_attention(q, k, v, **terms)

    prefix_attention = layers.prefix_attention
    monkeypatch.setattr(layers, "prefix_attention", spy)
    attention(torch.randn(6, N, 32), torch.randn(2, 7, WIDTH), repeat_time=3)
    q, k, v = attended[0]
    assert (q.shape[:2], k.shape[:2], v.shape[:2]) == ((2, 3 * N), (2, 7), (2, 7))
    assert k.untyped_storage().data_ptr() == projected[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("form", ["none", "zeros", "causal", "prefix", "padded", "arbitrary"])
def test_forward_train_takes_any_mask(form):
    batch, seqlen = 2, 9
    seen = torch.ones(batch, seqlen, seqlen, dtype=torch.bool)
    if form == "causal":
        seen = seen_of(batch, seqlen)
    elif form == "prefix":
        seen = seen_of(batch, seqlen, zero=True)
    elif form == "padded":
        seen = seen_of(batch, seqlen, padded_left(batch, seqlen, 3), zero=False)
    elif form == "arbitrary":
        seen = torch.rand(batch, seqlen, seqlen) < 0.6
        seen |= torch.eye(seqlen, dtype=torch.bool)
    lowest = torch.finfo(torch.float32).min
    mask = None if form == "none" else torch.zeros(batch, 1, seqlen, seqlen).masked_fill(~seen[:, None], lowest)
    if form != "none":
        assert (qllama.masks.recognise(mask) is None) == (form == "arbitrary")
    inputs = (torch.randn(batch, seqlen, 32), torch.randn(batch, 5, WIDTH))
    compare_with_dense(tiny(LlamaModel), inputs, seen, train=True, attention_mask=mask)


def test_recognise_is_exact():
    """Every 0/-inf mask over three tokens: what is recognised gives the same visible pairs, row by row."""
    found = 0
    for bits in range(2**9):
        seen = torch.tensor([bits >> i & 1 for i in range(9)], dtype=torch.bool).view(1, 3, 3)
        mask = qllama.masks.recognise(torch.zeros(1, 1, 3, 3).masked_fill(~seen[:, None], -torch.inf))
        if mask is None:
            continue
        found += 1
        q = torch.zeros(1, 3, 1, 3)
        value = torch.eye(3).view(1, 3, 1, 3)
        weights = mask.attend(q, q, value)[0, :, 0]  # [queries, keys], uniform over the visible ones
        assert torch.equal(weights > 0, seen[0]), seen
    assert found == 2 * 3 * 3  # each key hidden, causal or open; the first is open anyway
    assert qllama.masks.recognise(torch.full((1, 1, 3, 3), -0.5)) is None


ROPES = {
    "default": None,
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("rope", ROPES)
def test_text_equals_transformers_llama(rope):
    """Rope scaling, grouped heads, biases, padding: the same weights in transformers' own LLaMA."""
    scaling = ROPES[rope] and {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    changes = {"attention_bias": True, "mlp_bias": True, "rope_scaling": scaling}
    config = LlamaConfig(**{**SIZES, **changes}, attn_implementation="eager")
    theirs = TheirLlama(config).eval()
    mine = tiny(cross_attention_frequency=10, **changes)
    missing = mine.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing.unexpected_keys and all("cross_attn" in key for key in missing.missing_keys)
    tokens, mask = ids(2, 80 if rope == "dynamic" else 24), None
    mask = padded_left(2, tokens.shape[1], 0, 5)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = mine(tokens, attention_mask=mask, position_ids=positions).logits
    want = theirs(tokens, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[mask == 1], want[mask == 1], atol=2e-4, rtol=2e-4)


def test_loss_is_the_shifted_cross_entropy():
    model, tokens, vision = tiny(), ids(2, 9), torch.randn(2, 5, WIDTH)
    labels = tokens.clone()
    labels[:, :4] = -100
    kept = labels.clone()
    outputs = model(tokens, vision_hidden_states=vision, labels=labels)
    want = functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, want)
    assert torch.equal(labels, kept)
    short = model(tokens, vision_hidden_states=vision, logits_to_keep=2).logits
    torch.testing.assert_close(short, outputs.logits[:, -2:])


def test_attentions_are_those_of_the_fused_path():
    model, embeds, vision = tiny(LlamaModel), torch.randn(2, 9, 32), torch.randn(2, 5, WIDTH)
    call = {"inputs_embeds": embeds, "vision_hidden_states": vision, "use_zero_attention_mask": True}
    fused, dense = model(**call), model(**call, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(fused.last_hidden_state, dense.last_hidden_state, atol=1e-5, rtol=1e-4)
    assert [a.shape for a in dense.attentions] == [(2, 4, 9, 9)] * 3 and len(dense.hidden_states) == 4
    assert bool((dense.attentions[0][:, :, :N, :N] > 0).all()) and not dense.attentions[0][:, :, 0, N:].any()
    as_tuple = model(**call, return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], fused.last_hidden_state)


def test_fused_paths_hold_nothing_of_the_size_of_a_mask():
    model, seqlen = tiny(LlamaModel), 700
    inputs = {"inputs_embeds": torch.randn(1, seqlen, 32), "vision_hidden_states": torch.randn(1, 40, WIDTH)}
    mask = padded_left(1, seqlen, 9)
    with LargestTensor() as largest:
        out = model(**inputs, attention_mask=mask, use_zero_attention_mask=True, use_cache=False).last_hidden_state
        out.sum().backward()
        model.forward_train(**inputs, use_cache=False).last_hidden_state.sum().backward()
    assert largest.numel <= seqlen * 48 < seqlen * seqlen / 4
    with LargestTensor() as largest, torch.no_grad():
        model(**inputs, output_attentions=True)
    assert largest.numel >= seqlen * seqlen
