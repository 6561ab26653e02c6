"""generate of converted models: the prompt seen in both directions, every way of decoding the same as re-encoding."""

import copy

import pytest
import torch
from internvl_kernels.models.prefix_lm import convert_hf_causal_lm_to_prefix_lm, prompt
from transformers import DynamicCache, StaticCache

from tests.hf_models import CONFIGS, FAMILIES, model_of
from tests.prefix_lm_reference import reference, reference_model

NEW = 7
PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9], [0, 0, 0, 7, 11, 13, 17, 19, 23]])
REAL = (PROMPT != 0).long()
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
}


def converted(name, **fields):
    return convert_hf_causal_lm_to_prefix_lm(model_of(name, **fields))


def positions_of(name, real):
    """What generate gives its models: real tokens counted; rotary models and BLOOM do not mind."""
    if name == "bloom":
        return {}
    counted = real.cumsum(1) - 1
    return {"position_ids": counted.masked_fill(real == 0, 1)}


def by_encoding_everything(name, prompt, real, prefix, steps=NEW):
    """(new tokens, logits of each step) of the dense reference that reads everything again for each token."""
    model, ids, scores = reference_model(name), prompt, []
    for _ in range(steps):
        with torch.no_grad():
            logits = reference(model, name, ids, real, prefix, **positions_of(name, real)).logits[:, -1]
        scores.append(logits)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        real = torch.cat([real, torch.ones_like(real[:, :1])], 1)
    return ids[:, prompt.shape[1] :], torch.stack(scores, 1)


def check(name, out, prefix=REAL):
    tokens, scores = by_encoding_everything(name, PROMPT, REAL, prefix)
    got = torch.stack(out.scores, 1)
    scale = scores.abs().max()
    torch.testing.assert_close(got / scale, scores / scale, atol=2e-5, rtol=0)
    assert torch.equal(out.sequences[:, -NEW:], tokens)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("way", WAYS)
def test_greedy_equals_encoding_everything(name, way):
    out = {"return_dict_in_generate": True, "output_scores": True}
    check(name, converted(name).generate(PROMPT, attention_mask=REAL, **GREEDY, **WAYS[way], **out))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mask_of_the_caller_is_kept_through_all_steps(name):
    prefix = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 1, 0]])
    out = {"return_dict_in_generate": True, "output_scores": True}
    for way in WAYS.values():
        got = converted(name).generate(PROMPT, attention_mask=REAL, bidirectional_mask=prefix, **GREEDY, **way, **out)
        check(name, got, prefix)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_without_attention_mask_and_as_embeddings(name):
    model = converted(name)
    want = model.generate(PROMPT[:1], attention_mask=REAL[:1], **GREEDY)
    assert torch.equal(model.generate(PROMPT[:1], **GREEDY), want)
    assert torch.equal(model.generate(input_ids=PROMPT[:1], **GREEDY), want)
    embeds = model.get_input_embeddings()(PROMPT[:1])
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), want[:, PROMPT.shape[1] :])
    both = model.generate(PROMPT, attention_mask=REAL, **GREEDY)
    assert torch.equal(model.generate(PROMPT, **GREEDY), both)  # pad tokens are recognised
    embeds = model.get_input_embeddings()(PROMPT)
    new = model.generate(inputs_embeds=embeds, attention_mask=REAL, **GREEDY)
    assert torch.equal(new, both[:, PROMPT.shape[1] :])


@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt", "mistral"])
def test_beams_reorder_the_cache(name):
    model = converted(name)
    how = {"num_beams": 4, "length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}
    out = model.generate(PROMPT, attention_mask=REAL, **{**GREEDY, "max_new_tokens": 4}, **how)
    full = out.sequences
    real = torch.cat([REAL, torch.ones(2, 4, dtype=torch.long)], 1)
    with torch.no_grad():
        logits = reference(reference_model(name), name, full, real, REAL, **positions_of(name, real)).logits
    picked = logits[:, -5:-1].log_softmax(-1).gather(2, full[:, -4:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, picked, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "bloom"])
def test_sampling_with_a_seed_is_the_same_with_every_cache(name):
    texts = []
    for way in WAYS.values():
        torch.manual_seed(5)
        how = {"do_sample": True, "top_k": 20, "num_return_sequences": 3, "max_new_tokens": 6, "pad_token_id": 0}
        texts.append(converted(name).generate(PROMPT, attention_mask=REAL, **how, **way))
    assert texts[0].shape == (6, 15) and len({tuple(row) for row in texts[0].tolist()}) > 3
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom", "llama"])
def test_assisted_and_prompt_lookup_equal_greedy(name):
    model, ids = converted(name), torch.tensor([[3, 14, 15, 9, 3, 14, 15, 9, 3, 14]])
    how = {**GREEDY, "eos_token_id": 96, "attention_mask": torch.ones_like(ids)}  # transformers 4 wants an end
    want = model.generate(ids, **how)
    lookup = model.generate(ids, prompt_lookup_num_tokens=3, **how)
    assert torch.equal(lookup, want)
    assistant = converted(name, num_hidden_layers=1) if name != "bloom" else converted(name, n_layer=1)
    helped = model.generate(ids, assistant_model=assistant, **how)
    assert torch.equal(helped, want)
    with pytest.raises(ValueError, match="assistant_model is not a prefix LM"):
        model.generate(ids, assistant_model=model_of(name), **how)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_continues_in_pieces(name):
    """Prompt, then several tokens at once, then one: the states of one pass over everything."""
    model, ids = converted(name), torch.randint(2, 80, (2, 14))
    real, prefix = torch.ones_like(ids), torch.zeros_like(ids)
    real[1, :2], prefix[:, :8] = 0, 1
    positions = positions_of(name, real)
    whole = model(ids, attention_mask=real, bidirectional_mask=prefix, **positions).logits
    past, parts = DynamicCache(), []
    for start, end in ((0, 9), (9, 13), (13, 14)):
        given = {k: v[:, start:end] for k, v in positions.items()}
        masks = {"attention_mask": real[:, :end], "bidirectional_mask": prefix[:, :end]}
        parts.append(model(ids[:, start:end], past_key_values=past, use_cache=True, **masks, **given).logits)
    got = torch.cat(parts, 1)
    torch.testing.assert_close(got[real.bool()], whole[real.bool()], atol=2e-5 * float(whole.abs().max()), rtol=0)


def test_original_generate_is_causal():
    for name in FAMILIES:
        model = converted(name)
        for way in WAYS.values():
            want = model_of(name).generate(PROMPT, attention_mask=REAL, **GREEDY, **way)
            assert torch.equal(model._original_generate(PROMPT, attention_mask=REAL, **GREEDY, **way), want)
        assert not torch.equal(model.generate(PROMPT, attention_mask=REAL, **GREEDY), want)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_static_cache_of_a_model_with_windows_keeps_every_key(name, monkeypatch):
    """Named in the configuration, for embeddings, in beams, and when nothing says how long."""
    made = []
    monkeypatch.setattr(prompt, "StaticCache", lambda **how: made.append(StaticCache(**how)) or made[-1])
    model, want = converted(name), by_encoding_everything(name, PROMPT, REAL, REAL)[0]
    how = {"attention_mask": REAL, "disable_compile": True}
    for place in (model.generation_config, copy.deepcopy(model.generation_config)):
        place.update(cache_implementation="static", do_sample=False, pad_token_id=0)
        out = model.generate(PROMPT, generation_config=place, max_new_tokens=NEW, **how)
        assert torch.equal(out[:, -NEW:], want)
        place.cache_implementation = None
    how["cache_implementation"] = "static"
    embeds = model.get_input_embeddings()(PROMPT)
    assert torch.equal(model.generate(inputs_embeds=embeds, **{**GREEDY, **how}), want)
    assert torch.equal(model.generate(PROMPT, do_sample=False, max_length=9 + NEW, **how)[:, -NEW:], want)
    assert torch.equal(model.generate(PROMPT, do_sample=False, **how)[:, 9 : 9 + NEW], want)
    beams = {**GREEDY, "num_beams": 3, "attention_mask": REAL}
    assert torch.equal(model.generate(PROMPT, **{**beams, **how}), model.generate(PROMPT, **beams))
    assert len(made) == 6 and not any(sliding for cache in made for sliding in cache.is_sliding)
    lookup = model.generate(
        PROMPT[:1], prompt_lookup_num_tokens=3, eos_token_id=96, **{**GREEDY, **how, "attention_mask": REAL[:1]}
    )
    assert torch.equal(lookup[:, -NEW:], want[:1]) and len(made) == 6  # needs a cache that can be cut


def test_caches_that_drop_a_prefix_are_refused():
    model = converted("mistral")
    with pytest.raises(ValueError, match="cache_implementation is 'offloaded_static' on a model with sliding windows"):
        model.generate(PROMPT, attention_mask=REAL, **GREEDY, cache_implementation="offloaded_static")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="sliding-window layers, which drop the prefix"):
        model(PROMPT, bidirectional_mask=REAL, past_key_values=cache)


def test_chunked_prefill_and_batches_are_refused():
    model = converted("gpt2")
    with pytest.raises(ValueError, match="prefill_chunk_size is 4"):
        model.generate(PROMPT, attention_mask=REAL, prefill_chunk_size=4, **GREEDY)
    with pytest.raises(NotImplementedError, match="no prefix masks"):
        model.generate_batch([[1, 2]])


@pytest.mark.parametrize(
    "mask,error,message",
    [
        (torch.ones(2, 10, dtype=torch.long), ValueError, "covers 10 keys, the prompt 9; what is generated is causal"),
        (torch.ones(3, 9, dtype=torch.long), ValueError, r"shape \[3, 9\]; expected \[batch, keys\] with batch 2"),
        (torch.ones(2, 9), TypeError, "dtype torch.float32"),
        ([[1] * 9] * 2, TypeError, "is a list"),
    ],
)
def test_wrong_masks_are_refused_before_the_prompt_is_read(mask, error, message):
    model = converted("gpt2")
    model.forward = None  # nothing may run
    for masked in ({"attention_mask": REAL}, {}):
        with pytest.raises(error, match=message):
            model.generate(PROMPT, bidirectional_mask=mask, **masked, **GREEDY)
