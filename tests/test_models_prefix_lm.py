"""Converted models against the eager model with dense masks, and what conversion must not disturb."""

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch
import transformers
from internvl_kernels.models import hf_attention
from internvl_kernels.models.hf_attention import attention, warn
from internvl_kernels.models.prefix_lm import (
    convert_hf_causal_lm_to_prefix_lm,
    load_prefix_lm,
    revert_prefix_lm,
)
from internvl_kernels.models.prefix_lm.attention import LayerConfig
from internvl_kernels.models.prefix_lm.families import bloom_alibi, bloom_alibi_slopes

from tests.golden import case_ids, replay
from tests.hf_models import CONFIGS, FAMILIES, TRANSFORMERS_5, model_of
from tests.largest_tensor import LargestTensor
from tests.prefix_lm_reference import SymmetricBloom, bloom_slopes, reference, reference_model

BANK = Path(__file__).parent / "golden_bank"
SOME = ("gpt2", "bloom", "mistral")  # one with a table, one with its own loop, one on the interface


@pytest.fixture(autouse=True)
def _fresh_warnings():
    warn.forget()


def tokens(batch=3, length=12):
    return torch.randint(2, 80, (batch, length), generator=torch.Generator().manual_seed(1))


ALL = ("111111111111", "111111111111", "111111111111")
MASKS = {  # attention_mask, bidirectional_mask
    "prefix": (ALL, ("111110000000", "100000000000", "111111111111")),
    "holes": (ALL, ("010011000100", "000000000001", "101010101010")),
    "left": (("000111111111", "111111111111", "000000011111"), ("111111100000", "000011100000", "111111111110")),
    "right": (("111111110000", "111111111111", "110000000000"), ("111100001111", "111100000000", "110000000000")),
    "inside": (("110011111011", "011111111111", "111111100111"), ("111110000000", "110000110000", "000000011100")),
    "none": (("000111111111", "111111111111", "111111110000"), ("000000000000", "000000000000", "000000000000")),
    "short": (ALL, ("1111", "0110", "1000")),
}
MASKS = {
    name: tuple(torch.tensor([[int(c) for c in row] for row in mask]) for mask in pair) for name, pair in MASKS.items()
}


def close(got, want, rows_compared=None):
    if rows_compared is not None:
        got, want = got[rows_compared], want[rows_compared]
    scale = want.abs().max()
    torch.testing.assert_close(got / scale, want / scale, atol=1e-5, rtol=0)


def converted(name, how="eager", **fields):
    return convert_hf_causal_lm_to_prefix_lm(model_of(name, how, **fields))


def mask_for(name, mask):
    """The shorter mask as it is or, for the families that ask for the full length, filled up."""
    if name in ("bloom", "opt") and mask.shape[1] < 12:
        return torch.nn.functional.pad(mask, (0, 12 - mask.shape[1]))
    return mask


@pytest.mark.filterwarnings("ignore:attn_implementation")
@pytest.mark.parametrize("case_id", [case_id for case_id in case_ids(BANK) if case_id.startswith("prefix_")])
def test_golden(case_id):
    for _, outcome in replay(BANK, case_id):
        assert not outcome.problems, outcome


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", MASKS)
def test_logits_equal_dense_attention(name, form):
    real, prefix = MASKS[form]
    want = reference(reference_model(name), name, tokens(), real, prefix).logits
    got = converted(name)(tokens(), attention_mask=real, bidirectional_mask=mask_for(name, prefix)).logits
    visible = real.bool() & (real.cumsum(1) > 0)
    close(got, want, visible)
    if form != "none":
        causal = reference(reference_model(name), name, tokens(), real, torch.zeros_like(real)).logits
        assert not torch.allclose(got[visible], causal[visible], atol=0.1), "the prefix changes nothing"


@pytest.mark.parametrize("name", FAMILIES)
def test_without_padding_mask_and_with_inputs_embeds(name):
    model, (real, prefix) = converted(name), MASKS["prefix"]
    want = model(tokens(), attention_mask=real, bidirectional_mask=prefix).logits
    assert torch.equal(model(tokens(), bidirectional_mask=prefix.bool()).logits, want)
    embeds = model.get_input_embeddings()(tokens())
    assert torch.equal(model(inputs_embeds=embeds, bidirectional_mask=prefix.to(torch.uint8)).logits, want)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("how", ["eager", "sdpa", "internvl"])
def test_without_a_mask_every_bit_is_the_causal_models(name, how):
    if how == "sdpa" and name in ("gpt_neo", "gptj", "bloom"):
        pytest.skip("this model of transformers has no SDPA")
    if how == "internvl":
        hf_attention.register()
        if name in ("gpt_neo", "gptj", "bloom"):
            pytest.skip("not on the attention interface")
    model, real = model_of(name, how), MASKS["left"][0]
    before = [model(tokens()).logits, model(tokens(), attention_mask=real, labels=tokens()).logits]
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad()
    model.eval()
    keys, own = list(model.state_dict()), model.config._attn_implementation
    assert convert_hf_causal_lm_to_prefix_lm(model) is model
    assert list(model.state_dict()) == keys and model.config._attn_implementation == own
    model(tokens(), attention_mask=real, bidirectional_mask=MASKS["left"][1])
    after = [model(tokens()).logits, model(tokens(), attention_mask=real, labels=tokens()).logits]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    assert all(torch.equal(grads[key], p.grad) for key, p in model.named_parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_dense_attention(name):
    real, prefix = MASKS["right"]
    labels = tokens().masked_fill(real == 0, -100)
    model, dense = converted(name), reference_model(name)
    reference(dense, name, tokens(), real, prefix, labels=labels).loss.backward()
    model(tokens(), attention_mask=real, bidirectional_mask=prefix, labels=labels).loss.backward()
    for (key, p), (_, q) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        bound = 1e-4 * float(q.grad.abs().max()) + 1e-6
        torch.testing.assert_close(p.grad, q.grad, atol=bound, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", (*FAMILIES, "mistral"))
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_those_of_the_same_mask(name, reentrant):
    real, prefix = MASKS["left"]
    grads = []
    for checkpointing in (False, True):
        model = converted(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        inputs = {"attention_mask": real, "bidirectional_mask": prefix, "labels": tokens()}
        model(tokens(), use_cache=False, **inputs).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_states_and_weights_are_returned(name):
    real, prefix = MASKS["prefix"]
    asked = {"output_attentions": True, "output_hidden_states": True}
    want = reference(reference_model(name), name, tokens(), real, prefix, **asked)
    with pytest.warns(UserWarning, match="output_attentions asks for the weights"):
        got = converted(name)(tokens(), attention_mask=real, bidirectional_mask=prefix, **asked)
    assert len(got.attentions) == len(want.attentions) == 2
    for a, b in zip(got.attentions + got.hidden_states, want.attentions + want.hidden_states, strict=True):
        close(a, b)


def test_dropout_runs_dense_with_a_word():
    model = converted("gpt2", attn_pdrop=0.3).train()
    with pytest.warns(UserWarning, match=r"attention dropout is 0\.3 while training"):
        one = model(tokens(), bidirectional_mask=MASKS["prefix"][1]).logits
    assert not torch.equal(one, model(tokens(), bidirectional_mask=MASKS["prefix"][1]).logits)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20])
def test_bloom_slopes(heads):
    torch.testing.assert_close(bloom_alibi_slopes(heads), bloom_slopes(heads), atol=0, rtol=1e-6)
    stock = model_of("bloom").transformer.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    torch.testing.assert_close(bloom_alibi_slopes(heads), stock.view(heads, 2)[:, 1], atol=0, rtol=1e-6)
    want = SymmetricBloom.build_alibi_tensor(None, torch.ones(2, 5), heads, torch.float32)
    torch.testing.assert_close(bloom_alibi(heads, 2, 5, 5), want, atol=0, rtol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_dense_mask_and_no_alibi_tensor(name, monkeypatch):
    """No tensor of S x S elements exists in a training step, and the kernels run in every layer."""
    length, calls = 400, []
    original = attention.prefix_attention
    monkeypatch.setattr(attention, "prefix_attention", lambda *a, **k: calls.append(k) or original(*a, **k))

    positions = {} if name == "bloom" else {"max_position_embeddings": 512}
    model, ids = converted(name, **positions).train(), tokens(1, length)
    real, prefix = torch.ones_like(ids), torch.zeros_like(ids)
    real[0, :5], prefix[0, :100] = 0, 1
    with LargestTensor() as largest:
        model(ids, attention_mask=real, bidirectional_mask=prefix, labels=ids).loss.backward()
    assert len(calls) == 2 and 0 < largest.numel < length * length
    revert_prefix_lm(model)
    with LargestTensor() as largest:
        model(ids, attention_mask=real)
    assert largest.numel >= length * length, "the probe sees nothing"


# ---- what must not be disturbed ----


@pytest.mark.parametrize("name", SOME)
def test_copies_are_independent_and_keep_the_prefix(name):
    model, (real, prefix) = converted(name), MASKS["left"]
    inputs = {"attention_mask": real, "bidirectional_mask": prefix}
    want, causal = model(tokens(), **inputs).logits, model(tokens()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and other is not model
        assert torch.equal(other(tokens(), **inputs).logits, want) and torch.equal(other(tokens()).logits, causal)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        revert_prefix_lm(other)
        assert torch.equal(model(tokens(), **inputs).logits, want)


@pytest.mark.parametrize("name", SOME)
def test_after_an_exception_nothing_lingers(name, monkeypatch):
    model, (real, prefix) = converted(name), MASKS["left"]
    causal = model(tokens()).logits
    block = model.get_submodule(
        {"gpt2": "transformer.h.1", "bloom": "transformer.h.1", "mistral": "model.layers.1"}[name]
    )

    def fail(*_, **__):
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(block, "forward", fail)
        for call in (model, model.generate):
            with pytest.raises(RuntimeError, match="in the middle"):
                call(tokens(), attention_mask=real, bidirectional_mask=prefix)
    assert torch.equal(model(tokens()).logits, causal)


@pytest.mark.parametrize("name", SOME)
def test_threads_do_not_share_a_mask(name):
    model, real = converted(name), torch.ones(3, 12, dtype=torch.long)
    masks = [torch.randint(0, 2, (3, 12)) for _ in range(4)] + [None]
    with torch.no_grad():
        want = [model(tokens(), attention_mask=real, bidirectional_mask=m).logits for m in masks]
        wrong = []

        def work(i):
            for _ in range(5):
                got = model(tokens(), attention_mask=real, bidirectional_mask=masks[i]).logits
                if not torch.allclose(got, want[i], atol=1e-4):
                    wrong.append(i)

        def run(i):
            with torch.no_grad():
                work(i)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(masks))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong


@pytest.mark.parametrize("name", CONFIGS)
def test_revert_and_convert_again(name):
    model, (real, prefix) = model_of(name), MASKS["left"]
    base, causal = type(model), model(tokens()).logits
    want = convert_hf_causal_lm_to_prefix_lm(model)(tokens(), attention_mask=real, bidirectional_mask=prefix).logits
    assert isinstance(model, base) and model._prefix_lm_converted and model.config.prefix_lm
    assert torch.equal(model._original_forward(tokens()).logits, causal)
    assert revert_prefix_lm(model) is model and type(model) is base and revert_prefix_lm(model) is model
    assert not hasattr(model.config, "prefix_lm") and not hasattr(model, "_prefix_lm_converted")
    assert all(type(m).__module__.startswith(("transformers", "torch")) for m in model.modules())
    assert not any(isinstance(getattr(m, "config", None), LayerConfig) for m in model.modules())
    assert torch.equal(model(tokens()).logits, causal)
    with pytest.raises((TypeError, ValueError)):
        revert_prefix_lm(model).generate(tokens(), bidirectional_mask=prefix, max_new_tokens=1)
    again = convert_hf_causal_lm_to_prefix_lm(model)
    assert torch.equal(again(tokens(), attention_mask=real, bidirectional_mask=prefix).logits, want)


@pytest.mark.parametrize("name", ("gpt2", "gpt_neo", "bloom", "llama"))
def test_save_and_load(name, tmp_path):
    model, (real, prefix) = converted(name), MASKS["left"]
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.prefix_lm is True and config.architectures == [type(model)._prefix_lm_base.__name__]
    again = load_prefix_lm(tmp_path, attn_implementation="eager")
    inputs = {"attention_mask": real, "bidirectional_mask": prefix}
    assert type(again) is type(model) and not again.training
    assert torch.equal(again(tokens(), **inputs).logits, model(tokens(), **inputs).logits)
    causal = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(causal(tokens()).logits, model(tokens()).logits)
    direct = type(model).from_pretrained(
        tmp_path, attn_implementation="eager"
    )  # the class itself makes prefix LMs, too
    assert torch.equal(direct(tokens(), **inputs).logits, model(tokens(), **inputs).logits)
    revert_prefix_lm(model).save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match="was not saved by a prefix LM"):
        load_prefix_lm(tmp_path / "causal")


def test_half_precision():
    for name in FAMILIES:
        model, (real, prefix) = converted(name), MASKS["prefix"]
        want = model(tokens(), attention_mask=real, bidirectional_mask=prefix).logits
        got = model.to(torch.bfloat16)(tokens(), attention_mask=real, bidirectional_mask=prefix).logits
        assert got.dtype == torch.bfloat16 or (name == "gptj" and not TRANSFORMERS_5)  # its head returned fp32
        error = (got.float() - want).abs().mean() / want.abs().mean()
        assert error < 0.05, name


def test_signature_names_the_mask():
    import inspect

    for name in FAMILIES:
        base = type(model_of(name))
        parameters = list(inspect.signature(converted(name).forward).parameters)
        assert "bidirectional_mask" in parameters
        parameters.remove("bidirectional_mask")
        assert parameters == list(inspect.signature(base.forward).parameters)[1:]
