"""LLaVA over LLaMA and over MPT: batches of any shape against each sample alone, prefixes, generation, caches."""

import pytest
import torch
from internvl_kernels.models.llava import LlavaConfig, LlavaLlamaForCausalLM
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from tests.largest_tensor import LargestTensor
from tests.llava_models import IGN, IMG, KINDS, PATCHES, batch, config_of, left_padded, model_of, rows_of

PREFIXES = (None, "prompt", "images")
PROMPT = {0: 5, 1: 6, 2: 4}  # tokens before the answer, in ``batch``


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_padded_batch_equals_each_sample_alone(kind, prefix):
    model, data = model_of(kind, mm_prefix=prefix), batch()
    alone = [model(**row) for row in rows_of(data)]
    labelled = torch.tensor([2, 3, 2])
    wanted = sum(out.loss * n for out, n in zip(alone, labelled, strict=True)) / labelled.sum()
    for given in (data, left_padded(data)):
        out = model(**given)
        torch.testing.assert_close(out.loss, wanted, atol=1e-5, rtol=1e-4)
        fused = given["attention_mask"].sum(1) + torch.tensor([1, 2, 0]) * (PATCHES - 1)
        for b in range(3):
            leading = int((given["attention_mask"][b].cumsum(0) == 0).sum())
            got = out.logits[b, leading : leading + fused[b]]
            torch.testing.assert_close(got, alone[b].logits[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_llama_kernels_equal_transformers_own_attention(prefix):
    """Forward, gradients, and one more chunk on a cache, against the dense masks of eager and SDPA."""
    data, results = batch(), {}
    for name in ("eager", "sdpa", "internvl"):
        model = model_of("llama", mm_prefix=prefix, attn_implementation=name)
        assert model.config._attn_implementation == name
        out = model(**data)
        out.loss.backward()
        cached = model(**{k: v for k, v in data.items() if k != "labels"}, use_cache=True).past_key_values
        mask = torch.ones(3, cached.get_seq_length() + 2, dtype=torch.long)
        more = model(input_ids=torch.tensor([[3, 4]] * 3), past_key_values=cached, attention_mask=mask).logits
        gradients = [model.model.mm_projector[0].weight.grad, model.model.layers[0].self_attn.k_proj.weight.grad]
        results[name] = [out.loss, *gradients, more]
    for name in ("eager", "sdpa"):
        for got, want in zip(results["internvl"], results[name], strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)


def seen_by(model, data, changed, row):
    """Fused positions of ``row`` whose last state changes with the token at ``changed`` of the prompt."""
    before = model(**data, output_hidden_states=True).hidden_states[-1]
    ids = data["input_ids"].clone()
    ids[row, changed] = 30
    after = model(**{**data, "input_ids": ids}, output_hidden_states=True).hidden_states[-1]
    return ((before - after).abs().amax(-1)[row] > 1e-5).nonzero().flatten().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_who_sees_whom(kind):
    """Row 1 fused: 1, image at 1 to 4, 5, 6, image at 7 to 10, 7 at 11 (the end of the prompt), the answer."""
    data = batch()
    causal, prompt, images = (model_of(kind, mm_prefix=prefix) for prefix in PREFIXES)
    assert seen_by(causal, data, 5, 1) == [11, 12, 13, 14]
    assert seen_by(prompt, data, 5, 1) == list(range(15))
    assert seen_by(images, data, 5, 1) == [11, 12, 13, 14]
    answer = 7  # a token of the answer, fused position 13
    for model in (causal, prompt, images):
        assert seen_by(model, data, answer, 1) == [13, 14]
    other = dict(data, images=data["images"].clone())
    other["images"][2] += 0.3  # the second image of row 1
    for model, first in ((causal, 7), (prompt, 0), (images, 0)):
        a, b = (model(**d, output_hidden_states=True).hidden_states[-1][1] for d in (data, other))
        assert ((a - b).abs().amax(-1) > 1e-6).nonzero().flatten().tolist() == list(range(first, 15))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_equals_encoding_everything_each_step(kind, prefix, side):
    model, data = model_of(kind, mm_prefix=prefix), batch()
    rows = rows_of(data)
    prompts = [row["input_ids"][:, : PROMPT[b]] for b, row in enumerate(rows)]
    wanted = [greedy(model, p[0].tolist(), rows[b]["images"], 5) for b, p in enumerate(prompts)]
    longest = max(p.shape[1] for p in prompts)
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for b, p in enumerate(prompts):
        where = slice(longest - p.shape[1], None) if side == "left" else slice(0, p.shape[1])
        ids[b, where], mask[b, where] = p[0], 1
    if (
        side == "right" and kind == "mpt"
    ):  # text alone cannot be padded there; with images all padding moves to the left
        assert model.generate(ids, images=data["images"], attention_mask=mask, max_new_tokens=1).shape == (
            3,
            longest + 1,
        )
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        out = model.generate(ids, images=data["images"], attention_mask=mask, max_new_tokens=5, **options)
        assert torch.equal(out[:, :longest], ids)
        assert out[:, longest:].tolist() == wanted, options


def greedy(model, prompt, images, steps):
    """The model's own next tokens, everything encoded anew for each."""
    row, new = list(prompt), []
    for _ in range(steps):
        ids = torch.tensor([row])
        prefix = {}
        if model.config.mm_prefix == "prompt":
            prefix["prefix_mask"] = torch.arange(len(row))[None] < len(prompt)
        logits = model(input_ids=ids, images=images, attention_mask=torch.ones_like(ids), **prefix).logits
        new.append(int(logits[0, -1].argmax()))
        row.append(new[-1])
    return new


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_beams_and_sampling_do_not_depend_on_the_other_rows(kind, prefix):
    model, data = model_of(kind, mm_prefix=prefix), batch()
    ids, mask = data["input_ids"][:2, :6], data["attention_mask"][:2, :6]
    both = model.generate(ids, images=data["images"], attention_mask=mask, num_beams=3, max_new_tokens=5)
    one = model.generate(ids[1:], images=data["images"][1:], num_beams=3, max_new_tokens=5)
    assert torch.equal(both[1:], one)
    several = model.generate(ids, images=data["images"], attention_mask=mask, num_beams=3, num_return_sequences=2,
                             max_new_tokens=4)  # fmt: skip
    assert several.shape == (4, 10) and torch.equal(several[2, :6], ids[1])
    torch.manual_seed(3)
    sampled = model.generate(ids, images=data["images"], attention_mask=mask, do_sample=True, max_new_tokens=6)
    assert sampled.shape == (2, 12) and not torch.equal(sampled[0, 6:], sampled[1, 6:])
    longer = model.generate(ids, images=data["images"], attention_mask=mask, max_length=9)
    assert longer.shape == (2, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_images_in_a_later_turn_are_read_on_top_of_the_cache(kind):
    model, data = model_of(kind), batch()
    row = rows_of(data)[1]
    whole = model(input_ids=row["input_ids"], images=row["images"]).logits
    first = model(input_ids=row["input_ids"][:, :3], images=row["images"][:1], use_cache=True)
    for mask in (None, torch.ones(1, 3 - 1 + PATCHES + 6, dtype=torch.long)):
        cache = DynamicCache()
        model(input_ids=row["input_ids"][:, :3], images=row["images"][:1], past_key_values=cache, use_cache=True)
        rest = model(input_ids=row["input_ids"][:, 3:], images=row["images"][1:], past_key_values=cache,
                     attention_mask=mask)  # fmt: skip
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_later_turn_remembers_the_padding_of_the_first(kind, prefix):
    """Two rows, the first padded on the left in turn one and on the right in turn two, which brings an image each."""
    model, images = model_of(kind, mm_prefix=prefix), torch.rand(2, 3, 16, 16)
    one = torch.tensor([[0, 0, 1, 5], [1, 7, 8, 9]])
    two = torch.tensor([[IMG, 6, 0], [11, IMG, 12]])
    mask = torch.cat([(one != 0).long(), (two != 0).long()], 1)

    def last_row_turn(b, first, second, attention):
        cache = DynamicCache()
        model(input_ids=first, attention_mask=attention[:, : first.shape[1]], past_key_values=cache, use_cache=True)
        return model(input_ids=second, images=images[b], past_key_values=cache, attention_mask=attention).logits

    together = last_row_turn(slice(0, 2), one, two, mask)
    for b, (first, second) in enumerate(((one[:1, 2:], two[:1, :2]), (one[1:], two[1:]))):
        ones = torch.ones(1, first.shape[1] + second.shape[1], dtype=torch.long)
        alone = last_row_turn(slice(b, b + 1), first, second, ones)
        torch.testing.assert_close(together[b, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_tuples_of_pairs_are_read_and_left_alone(kind):
    model, ids = model_of(kind), torch.tensor([[1, 5, 6, 7]])
    filled = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    assert isinstance(filled, DynamicCache)
    pairs = tuple((layer.keys.clone(), layer.values.clone()) for layer in filled.layers)
    step = model(input_ids=ids[:, 3:], past_key_values=pairs)
    torch.testing.assert_close(step.logits, model(input_ids=ids).logits[:, 3:], atol=1e-5, rtol=1e-4)
    assert pairs[0][0].shape[2] == 3
    wrong = {
        "holds 1 layers; this model has 2": pairs[:1],
        r"layer 0: key has shape \[2, ": tuple((k.expand(2, -1, -1, -1), v) for k, v in pairs),
        r"expected \[1, . tokens, 8\]".replace(" tokens", ", tokens"): tuple((k[..., :4], v) for k, v in pairs),
        "is a EncoderDecoderCache": EncoderDecoderCache(DynamicCache(), DynamicCache()),
        "is a int": 3,
    }
    for sentence, past in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            model(input_ids=ids[:, 3:], past_key_values=past)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_names_sample_token_and_figure(kind):
    model, data = model_of(kind), batch()
    ids, images = data["input_ids"], data["images"]
    high = ids.clone()
    high[1, 2] = 40
    cases = [
        (r"images: 2 given, expected 3.*sample 1 has 2 placeholders and finds 1", {**data, "images": images[:2]}),
        (r"images: 5 given, expected 3", {**data, "images": torch.rand(5, 3, 16, 16)}),
        (r"input_ids\[0, 2\] is an image placeholder \(-200\); images is None", {"input_ids": ids}),
        (r"input_ids\[1, 2\] is 40; allowed: 0 to 39", {**data, "input_ids": high}),
        (r"images have shape \[3, 3, 8, 8\]; .*\[n, 3, 16, 16\]", {**data, "images": torch.rand(3, 3, 8, 8)}),
        (r"images have shape \[3, 1, 16, 16\]", {**data, "images": torch.rand(3, 1, 16, 16)}),
        (r"attention_mask has shape \[3, 5\]; input_ids has \[3, 9\]", {**data, "attention_mask": torch.ones(3, 5)}),
        (r"labels has shape \[3, 5\]", {**data, "labels": data["labels"][:, :5]}),
        (r"prefix_mask was given; this model is causal", {**data, "prefix_mask": torch.ones(3, 9)}),
        (r"inputs_embeds has shape \[3, 4, 8\]; expected \[batch, tokens, 32\]",
         {"inputs_embeds": torch.rand(3, 4, 8)}),
        (r"pass exactly one of input_ids and inputs_embeds", {}),
        (r"attention_mask has shape \[1, 2\]; expected \[1, 3\]",
         {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 2)}),
    ]  # fmt: skip
    for sentence, inputs in cases:
        with pytest.raises(ValueError, match=sentence):
            model(**inputs)
    with pytest.raises(ValueError, match=r"input_ids\[0, 2\] is an image placeholder"):
        model.generate(ids, max_new_tokens=1)
    with pytest.raises(ValueError, match="mm_prefix is 'text'; allowed: None, 'prompt', 'images'"):
        config_of(kind, mm_prefix="text")


@pytest.mark.parametrize("kind", KINDS)
def test_text_only_training_needs_no_images_and_keeps_the_projector_in_the_graph(kind):
    model = model_of(kind, mm_tune_vision_tower=True)
    row = rows_of(batch())[2]
    wanted = model(**row).loss
    model.train()
    loss = model(**row).loss
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    inner = model.get_model()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in inner.mm_projector.parameters())
    layer = inner.vision_tower.vision_tower.get_submodule("encoder" if hasattr(
        inner.vision_tower.vision_tower, "encoder") else "vision_model.encoder").layers[0]  # fmt: skip
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [None, "prompt"])
def test_gradient_checkpointing_gives_the_same_gradients(kind, prefix):
    data, found = batch(), []
    for on in (False, True):
        model = model_of(kind, mm_prefix=prefix, mm_tune_vision_tower=True).train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**data).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 30
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_autocast_stay_close_to_fp32(kind):
    data, model = batch(), model_of(kind, mm_prefix="prompt")
    wanted = model(**data)
    with torch.autocast("cpu", torch.bfloat16):
        auto = model(**data)
    assert auto.logits.dtype == torch.bfloat16 or kind == "llama"
    torch.testing.assert_close(auto.loss.float(), wanted.loss, atol=0.1, rtol=0.1)
    low = model.bfloat16()(**data)
    assert low.logits.dtype == torch.bfloat16
    torch.testing.assert_close(low.loss.float(), wanted.loss, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_no_tensor_is_as_large_as_the_square_of_the_sequence(kind, prefix):
    model, tokens = model_of(kind, mm_prefix=prefix).train(), 1024
    ids = torch.randint(2, 40, (1, tokens))
    ids[0, 3] = ids[0, 500] = IMG
    labels = torch.where(torch.arange(tokens) < 700, IGN, ids)
    with LargestTensor() as largest:
        model(input_ids=ids, labels=labels, images=torch.rand(2, 3, 16, 16)).loss.backward()
    assert largest.numel < tokens * tokens / 4, largest.numel  # MLP activations have 1030 * 128


def test_auto_classes_build_it_and_the_kernels_are_the_default():
    model = AutoModelForCausalLM.from_config(config_of("llama"))
    assert type(model) is LlavaLlamaForCausalLM and model.config._attn_implementation == "internvl"
    assert model.get_vision_tower().config._attn_implementation in ("sdpa", "eager")
    text = LlavaLlamaForCausalLM(LlavaConfig(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                             num_attention_heads=2))  # fmt: skip
    assert text.get_vision_tower() is None and not hasattr(text.model, "mm_projector")
    with pytest.raises(ValueError, match=r"an image placeholder \(-200\); the model has no vision tower"):
        text(input_ids=torch.tensor([[1, IMG]]), images=torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="with mm_prefix = 'prompt' 'internvl', 'sdpa' and 'eager' are allowed"):
        flex = model_of("llama", mm_prefix="prompt")
        flex.config._attn_implementation = "flex_attention"
        flex(input_ids=torch.tensor([[1, 2]]))
