"""Batches, training loops and wrappers around converted models, and every input that they refuse."""

import copy
import importlib.util

import pytest
import torch
import transformers
from internvl_kernels.models.prefix_lm import (
    PrefixLMCollator,
    add_bidirectional_mask_if_missing,
    convert_hf_causal_lm_to_prefix_lm,
)
from torch import nn

from tests.hf_models import CONFIGS, FAMILIES, model_of

PAIRS = [
    {"prompt": [5, 6, 7], "answer": [8, 9]},
    {"prompt": torch.tensor([11, 12]), "answer": [13]},
    {"prompt": [21, 22, 23, 24, 25], "answer": [26, 27, 28]},
]


def converted(name, **fields):
    return convert_hf_causal_lm_to_prefix_lm(model_of(name, **fields))


def installed(package):
    return importlib.util.find_spec(package) is not None


# ---- batches ----


def test_collator_pads():
    batch = PrefixLMCollator(pad_token_id=0, eos_token_id=2)(PAIRS)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 2, 0, 0, 0],
        [11, 12, 13, 2, 0, 0, 0, 0, 0],
        [21, 22, 23, 24, 25, 26, 27, 28, 2],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * 3, [1] * 4 + [0] * 5, [1] * 9]
    assert batch["bidirectional_mask"].tolist() == [[1] * 3 + [0] * 6, [1] * 2 + [0] * 7, [1] * 5 + [0] * 4]
    assert batch["labels"][0].tolist() == [-100, -100, -100, 8, 9, 2, -100, -100, -100]
    assert set(batch) == {"input_ids", "attention_mask", "bidirectional_mask", "labels"}
    given = {k: v.clone() for k, v in batch.items() if k != "bidirectional_mask"}
    add_bidirectional_mask_if_missing(given)
    assert torch.equal(given["bidirectional_mask"], batch["bidirectional_mask"])
    left = PrefixLMCollator(pad_token_id=0, eos_token_id=2, padding_side="left", pad_to_multiple_of=8)(PAIRS)
    assert left["input_ids"].shape == (3, 16)
    for name, value in batch.items():
        for row, (a, b) in enumerate(zip(left[name], value, strict=True)):
            n = int(batch["attention_mask"][row].sum())
            assert torch.equal(a[16 - n :], b[:n]), name


def test_collator_shortens_the_prompt_first():
    batch = PrefixLMCollator(pad_token_id=0, max_length=4)(PAIRS)
    assert batch["input_ids"].tolist() == [[6, 7, 8, 9], [11, 12, 13, 0], [25, 26, 27, 28]]
    assert PrefixLMCollator(pad_token_id=0, max_length=2)(PAIRS[2:])["labels"].tolist() == [[26, 27]]


def test_collator_refuses():
    with pytest.raises(ValueError, match="packing needs the length of a row"):
        PrefixLMCollator(pad_token_id=0, packed=True)
    with pytest.raises(ValueError, match="padding_side is 'top'"):
        PrefixLMCollator(pad_token_id=0, padding_side="top")
    with pytest.raises(ValueError, match="no examples"):
        PrefixLMCollator(pad_token_id=0)([])
    with pytest.raises(KeyError, match="answer"):
        PrefixLMCollator(pad_token_id=0)([{"prompt": [1]}])


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_pairs_do_not_see_each_other(name):
    """Logits and loss of packed rows are those of each pair alone."""
    model = converted(name)
    padded = PrefixLMCollator(pad_token_id=0)(PAIRS)
    packed = PrefixLMCollator(pad_token_id=0, packed=True, max_length=9)(PAIRS)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9, 11, 12, 13], [21, 22, 23, 24, 25, 26, 27, 28]]
    assert packed["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2] and "attention_mask" not in packed
    want, got = model(**padded), model(**packed)
    bound = 1e-5 * float(want.logits.abs().max())
    for (row, a, b), alone in zip([(0, 0, 5), (0, 5, 8), (1, 0, 8)], want.logits, strict=True):
        torch.testing.assert_close(got.logits[row, a:b], alone[: b - a], atol=bound, rtol=0)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-4, rtol=1e-4)
    padded_end = PrefixLMCollator(pad_token_id=0, packed=True, max_length=8, pad_to_multiple_of=12)(PAIRS)
    torch.testing.assert_close(model(**padded_end).logits[:, :8], got.logits, atol=bound, rtol=0)


# ---- loops and wrappers ----


def steps(model, batch, count=8):
    """Losses of a few steps of plain SGD."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.02), []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("name", FAMILIES)
def test_training_lowers_the_loss(name):
    losses = steps(converted(name).train(), PrefixLMCollator(pad_token_id=0)(PAIRS))
    assert losses[-1] < 0.7 * losses[0]


@pytest.fixture
def process_group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["gpt2", "bloom", "mistral"])
def test_ddp_and_fsdp(name, process_group):
    batch = PrefixLMCollator(pad_token_id=0)(PAIRS)
    plain = converted(name).train()
    want = steps(copy.deepcopy(plain), batch, 3)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    torch.testing.assert_close(steps(wrapped, batch, 3), want, atol=1e-5, rtol=1e-5)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = copy.deepcopy(plain)
    for block in sharded.get_submodule("model.layers" if name == "mistral" else "transformer.h"):
        torch.distributed.fsdp.fully_shard(block, mesh=mesh)
    torch.distributed.fsdp.fully_shard(sharded, mesh=mesh)
    torch.testing.assert_close(steps(sharded, batch, 3), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_trainer(name, tmp_path):
    if not installed("accelerate"):
        pytest.skip("the Trainer of transformers needs accelerate (pip install accelerate)")
    model = converted(name)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=3, max_steps=3, report_to=[], save_strategy="no",
        gradient_checkpointing=True, use_cpu=True, learning_rate=1e-2, remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=PAIRS * 2, data_collator=PrefixLMCollator(pad_token_id=0)
    )
    assert "bidirectional_mask" in (trainer._set_signature_columns_if_needed() or trainer._signature_columns)
    before = float(model.eval()(**PrefixLMCollator(pad_token_id=0)(PAIRS)).loss)
    trainer.train()
    assert float(model.eval()(**PrefixLMCollator(pad_token_id=0)(PAIRS)).loss) < before


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_peft(name):
    if not installed("peft"):
        pytest.skip("peft is not installed (pip install peft)")
    import peft

    model, batch = converted(name), PrefixLMCollator(pad_token_id=0)(PAIRS)
    want = model(**batch).logits
    target = "c_attn" if name == "gpt2" else "query_key_value"
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], task_type="CAUSAL_LM"))
    assert torch.allclose(tuned(**batch).logits, want, atol=1e-5)
    assert steps(tuned.train(), batch, 5)[-1] < steps(copy.deepcopy(tuned), batch, 1)[0] + 1
    prompt = torch.tensor([[5, 6, 7]])
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    text = tuned.eval().generate(input_ids=prompt, **how)
    merged = tuned.merge_and_unload()
    assert torch.equal(merged.generate(prompt, **how), text)


# ---- refused, and the model stays as it was ----


def refused(model, error, match):
    """Conversion raises, and nothing about the model has changed."""
    classes, configs = [type(m) for m in model.modules()], [getattr(m, "config", None) for m in model.modules()]
    with pytest.raises(error, match=match):
        convert_hf_causal_lm_to_prefix_lm(model)
    assert [type(m) for m in model.modules()] == classes
    assert all(a is b for a, b in zip((getattr(m, "config", None) for m in model.modules()), configs, strict=True))
    assert not hasattr(getattr(model, "config", None), "prefix_lm")


def test_models_that_are_no_causal_lm():
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 11,
    }
    refused(nn.Linear(2, 2), TypeError, "Linear is not a causal LM")
    refused(
        transformers.BertForMaskedLM(transformers.BertConfig(**small)), TypeError, "BertForMaskedLM is not a causal LM"
    )
    refused(model_of("gpt2").transformer, TypeError, "GPT2Model is not a causal LM")
    t5 = transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    refused(transformers.T5ForConditionalGeneration(t5), TypeError, "T5ForConditionalGeneration")
    mpt = transformers.MptConfig(d_model=8, n_heads=2, n_layers=1, vocab_size=11)
    refused(transformers.MptForCausalLM(mpt), TypeError, "does not go through the attention interface")


def test_cross_attention_and_other_layers():
    refused(model_of("gpt2", add_cross_attention=True), ValueError, "has cross attention")
    model = model_of("llama")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    refused(model, ValueError, "layers of type chunked_attention")
    model = model_of("llama")
    model.model.layers[1].self_attn.is_causal = False
    refused(model, ValueError, "attention that is not causal")


def test_converting_twice_is_no_error():
    model = converted("gpt2")
    assert convert_hf_causal_lm_to_prefix_lm(model) is model


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_that_do_not_fit(name):
    model, ids = converted(name), torch.randint(2, 80, (2, 6))
    before = model(ids).logits
    cases = [
        (torch.ones(2, 6), TypeError, "has dtype torch.float32; expected bool or an integer dtype"),
        ([[1] * 6] * 2, TypeError, "bidirectional_mask is a list"),
        (torch.ones(3, 6, dtype=torch.long), ValueError, r"shape \[3, 6\]; expected \[batch, keys\] with batch 2"),
        (torch.ones(6, dtype=torch.long), ValueError, r"shape \[6\]"),
        (torch.ones(2, 1, 6, 6, dtype=torch.long), ValueError, r"shape \[2, 1, 6, 6\]"),
    ]
    if name != "bloom":  # BLOOM has no last position
        cases.append((torch.ones(2, 65, dtype=torch.long), ValueError, "covers 65 keys; the model has 64 positions"))
    if name in ("bloom", "opt"):
        cases.append((torch.ones(2, 5, dtype=torch.long), ValueError, "covers 5 keys; this model expects"))
    for mask, error, match in cases:
        with pytest.raises(error, match=match):
            model(ids, bidirectional_mask=mask)
    good = torch.ones(2, 6, dtype=torch.long)
    for wrong in (torch.ones(2, 5), torch.ones(2, 1, 6, 6), torch.ones(2, 7)):
        with pytest.raises(ValueError, match=r"attention_mask has shape .* it must be \[batch, keys\] = \[2, 6\]"):
            model(ids, attention_mask=wrong, bidirectional_mask=good)
    with pytest.raises(TypeError, match="past_key_values is a tuple; expected a transformers Cache"):
        model(ids, bidirectional_mask=good, past_key_values=((1, 2),))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(bidirectional_mask=good)
    assert torch.equal(model(ids).logits, before)
