"""attn_implementation="internvl" inside unmodified models against their own eager attention."""

import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from internvl_kernels.models import hf_attention
from internvl_kernels.models.hf_attention import attention, carrier, warn

from tests.hf_models import CONFIGS, TRANSFORMERS_5, VOCABULARY, gemma3, model_of, paligemma, randomised
from tests.largest_tensor import LargestTensor

ON_INTERFACE = [name for name in CONFIGS if name not in ("gpt_neo", "gptj", "bloom")]
NAME = hf_attention.register()


@pytest.fixture(autouse=True)
def _fresh_warnings():
    warn.forget()


@pytest.fixture
def paths(monkeypatch):
    """Names of the calls that attention made: "fused", "blocks", "dense"."""
    taken = []
    for name, label in (("prefix_attention", "fused"), ("attend_with_blocks", "blocks"), ("dense_attention", "dense")):
        original = getattr(attention, name)

        def spy(*args, _original=original, _label=label, **kwargs):
            taken.append(_label)
            return _original(*args, **kwargs)

        monkeypatch.setattr(attention, name, spy)
    return taken


def tokens(batch=2, length=11):
    return torch.randint(2, 80, (batch, length), generator=torch.Generator().manual_seed(1))


def close(got, want, rows=None):
    if rows is not None:
        got, want = got[rows], want[rows]
    scale = want.abs().max()
    torch.testing.assert_close(got / scale, want / scale, atol=1e-5, rtol=0)


def both(name, **fields):
    return model_of(name, "eager", **fields), model_of(name, NAME, **fields)


@pytest.mark.parametrize("name", ON_INTERFACE)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_equal_eager(name, side, paths):
    eager, fused = both(name)
    ids, mask = tokens(), torch.ones(2, 11, dtype=torch.long)
    if side != "none":
        mask[1, :4] = 0
        mask = mask if side == "left" else mask.flip(1)
    given = {} if side == "none" else {"attention_mask": mask}
    want = eager(ids, **given).logits
    paths.clear()
    close(fused(ids, **given).logits, want, mask.bool())
    if TRANSFORMERS_5 or name != "opt":  # OPT of transformers 4 builds its own dense mask
        assert paths == ["fused"] * 2


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2", "opt"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_equals_eager(name, cache):
    eager, fused = both(name)
    ids, mask = tokens(), torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    how = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        how |= {"cache_implementation": "static", "disable_compile": True}
    out = {"return_dict_in_generate": True, "output_scores": True}
    want, got = eager.generate(ids, **how, **out), fused.generate(ids, **how, **out)
    assert torch.equal(got.sequences, want.sequences)
    close(torch.stack(got.scores), torch.stack(want.scores))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_documents_are_segments(name, paths):
    eager, fused = both(name)
    ids = tokens(length=14)
    positions = torch.cat([torch.arange(8), torch.arange(6)])[None].expand(2, -1)
    given = {"position_ids": positions, "use_cache": False}
    got = fused(ids, **given).logits
    assert paths == ["fused"] * 2
    close(got, eager(ids, **given).logits)
    close(got[:, 8:], fused(ids[:, 8:]).logits)
    assert not torch.allclose(got[:, 8:], fused(ids).logits[:, 8:], atol=0.1)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_gradients_equal_eager(name):
    ids = tokens()
    grads = []
    for model in both(name):
        model.train()
        model(ids, labels=ids).loss.backward()
        grads.append({k: p.grad for k, p in model.named_parameters()})
    for key, want in grads[0].items():
        torch.testing.assert_close(grads[1][key], want, atol=2e-5, rtol=2e-4, msg=key)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_equal(reentrant):
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    grads = []
    for checkpointing in (False, True):
        model = model_of("llama", NAME).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def images(batch=2):
    return torch.randn(batch, 3, 28, 28, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("prompt", [7, 9])
def test_paligemma_prefix(prompt, paths):
    ids = tokens().clamp(max=80)
    ids[:, :4] = 90
    types = torch.zeros_like(ids)
    types[:, prompt:] = 1
    given = {"pixel_values": images(), "token_type_ids": types, "attention_mask": torch.ones_like(ids)}
    if not TRANSFORMERS_5:
        given["labels"] = ids  # there only training has the prefix of token_type_ids
    want = paligemma("eager")(ids, **given).logits
    paths.clear()
    close(paligemma(NAME)(ids, **given).logits, want)
    if TRANSFORMERS_5:  # transformers 4 builds a dense mask for this model
        assert set(paths) == {"fused"}


@pytest.mark.parametrize("window", [3, 6, 20])
def test_gemma3_image_blocks(window, paths):
    ids = tokens(length=15).clamp(max=80)
    types = torch.zeros_like(ids)
    types[0, 2:6] = types[1, 4:8] = 1
    ids[types == 1] = 90
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    given = {"pixel_values": images(), "token_type_ids": types, "attention_mask": mask}
    eager, fused = gemma3("eager", sliding_window=window), gemma3(NAME, sliding_window=window)
    want = eager(ids, **given).logits
    paths.clear()
    got = fused(ids, **given).logits
    close(got, want, mask.bool())
    assert paths.count("blocks") >= 1 and "dense" not in paths
    causal = fused(ids, **{**given, "token_type_ids": torch.zeros_like(types)}).logits
    assert not torch.allclose(got[1, 4:8], causal[1, 4:8], atol=0.1)


def test_gemma3_block_gradients():
    ids = tokens().clamp(max=80)
    types = torch.zeros_like(ids)
    types[:, 3:7] = 1
    ids[types == 1] = 90
    grads = []
    for how in ("eager", NAME):
        model = gemma3(how)
        model(ids, pixel_values=images(), token_type_ids=types).logits.square().mean().backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    for key, want in grads[0].items():
        torch.testing.assert_close(grads[1][key], want, atol=1e-4 * float(want.abs().max()) + 1e-6, rtol=1e-3, msg=key)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="BERT of transformers 4 is not on the attention interface")
def test_encoder_sees_everything():
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "intermediate_size": 48}
    ids, mask = tokens(), torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    for given in ({}, {"attention_mask": mask}):
        outs = []
        for how in ("eager", NAME):
            bert = transformers.BertModel._from_config(transformers.BertConfig(**config), attn_implementation=how)
            outs.append(randomised(bert)(ids, **given).last_hidden_state)
        close(outs[1], outs[0], mask.bool() if given else None)


def test_soft_cap_runs_dense_with_one_warning(paths):
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "sliding_window": 5}
    config |= {"attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
    eager, fused = (
        randomised(
            transformers.Gemma2ForCausalLM._from_config(transformers.Gemma2Config(**config), attn_implementation=how)
        )
        for how in ("eager", NAME)
    )
    want = eager(tokens()).logits
    with pytest.warns(UserWarning, match="softcap") as caught:
        close(fused(tokens()).logits, want)
    assert len([w for w in caught if "internvl" in str(w.message)]) == 1
    assert set(paths) == {"dense"}


def test_dropout_and_weights_run_dense_with_a_word():
    model = model_of("llama", NAME, attention_dropout=0.5).train()
    with pytest.warns(UserWarning, match=r"attention dropout is 0\.5 while training"):
        model(tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(tokens())
    with pytest.warns(UserWarning, match="output_attentions"):
        got = model(tokens(), output_attentions=True).attentions
    want = model_of("llama", "eager")(tokens(), output_attentions=True).attentions
    if got is not None and got[0] is not None:
        torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-4)


def test_chunked_attention_runs_dense_with_a_word(paths):
    mask = torch.ones(2, 11, dtype=torch.long)
    from transformers.masking_utils import chunked_causal_mask_function

    chunks = chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))
    where = {"cache_position": torch.arange(11)} if not TRANSFORMERS_5 else {"q_length": 11, "q_offset": 0}
    with pytest.warns(UserWarning, match="no form for this model's mask"):
        got = hf_attention.internvl_mask(2, kv_length=11, mask_function=chunks, attention_mask=mask.bool(), **where)
    i = torch.arange(11)
    want = (i[:, None] >= i) & (i[:, None] // 4 == i // 4)
    assert got.dtype == torch.bool and torch.equal(got, want.expand(2, 1, 11, 11))
    llama = model_of("llama", NAME)
    additive = torch.where(got, 0, -1e30)
    close(llama(tokens(), attention_mask=got).logits, model_of("llama")(tokens(), attention_mask=additive).logits)
    assert set(paths) == {"dense"}


def test_models_off_the_interface_are_refused():
    model = model_of("bloom", NAME)
    if not TRANSFORMERS_5:  # there BLOOM builds its own mask, so that the name changes nothing
        return close(model(tokens()).logits, model_of("bloom")(tokens()).logits)
    with pytest.raises(ValueError, match="type 'bloom', whose attention does not go through"):
        model(tokens())


def test_no_dense_mask_is_built():
    """No tensor of S x S elements or more exists in a forward and backward pass."""
    length = 384
    model = model_of("llama", NAME, max_position_embeddings=512).train()
    ids, mask = tokens(1, length), torch.ones(1, length, dtype=torch.long)
    mask[0, :5] = 0
    with LargestTensor() as largest:
        model(ids, attention_mask=mask).logits[:, -1].sum().backward()
    assert largest.numel < length * length
    with LargestTensor() as largest:
        model_of("llama", "eager", max_position_embeddings=512)(ids, attention_mask=mask)
    assert largest.numel >= length * length, "the probe sees nothing"


@pytest.mark.parametrize("planes", range(8))
@pytest.mark.parametrize("window", list(carrier.Window))
def test_carrier_round_trip(planes, window):
    flags = torch.randint(0, 4, (2, 5), dtype=torch.uint8)
    written = torch.tensor([1, 1, 1, 0, 0]) if planes & 1 else None
    segments = torch.randint(-(2**31), 2**31, (2, 5)).int() if planes & 2 else None
    blocks = torch.randint(-1, 300, (2, 5)).int() if planes & 4 else None
    packed = carrier.encode(flags, written, segments, blocks, window, weights=bool(planes & 1))
    assert carrier.is_carrier(packed)
    got = carrier.decode(packed, 5)
    assert torch.equal(got.key_flags, flags) and got.window is window and got.weights == bool(planes & 1)
    assert (got.segment_ids is None) == (planes < 2)
    assert (got.query_start(2) is None) == (written is None)
    if written is not None:
        assert got.query_start(2).tolist() == [1, 1]
    assert segments is None or torch.equal(got.segment_ids, segments)
    assert (got.block_ids is None) == (blocks is None)
    assert blocks is None or torch.equal(got.block_ids, blocks)
    with pytest.raises(ValueError, match="describes 5 keys; attention was called with 6"):
        carrier.decode(packed, 6)


def test_importing_changes_nothing():
    code = (
        "import internvl_kernels.models.hf_attention as h; from transformers import AttentionInterface;"
        "assert 'internvl' not in AttentionInterface().valid_keys(); h.register();"
        "assert 'internvl' in AttentionInterface().valid_keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
