"""Q-LLaMA decoding: every kind of cache, every way of generating, the same as reading everything again."""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from tests.qllama_models import N, ids, padded_left, tiny, vision_of


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def new_cache(kind, config):
    if kind == "dynamic":
        return DynamicCache()
    if kind == "static":
        return StaticCache(config=config, max_cache_len=24)
    if kind == "encoder_decoder":
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return ()


# ---- caches ----


@pytest.mark.parametrize("kind", ["dynamic", "static", "encoder_decoder", "tuple"])
@pytest.mark.parametrize("zero", [False, True], ids=["causal", "zero_mask"])
def test_cached_chunks_equal_one_pass(kind, zero):
    """The query block and some text, then three tokens, then one at a time; left out padding stays hidden."""
    model, tokens, vision = tiny(), ids(2, 13), vision_of(2)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, N : N + 2] = 0  # padded text behind the queries
    call = {"vision_hidden_states": vision, "use_zero_attention_mask": zero}
    whole = model(tokens, attention_mask=mask, use_cache=False, **call).logits
    past = new_cache(kind, model.config) or None
    parts, at = [], 0
    for length in (8, 3, 1, 1):
        step = model(
            tokens[:, at : at + length],
            attention_mask=mask[:, : at + length],
            past_key_values=past,
            use_cache=True,
            **call,
        )
        parts.append(step.logits)
        past = step.past_key_values
        if kind == "tuple":
            past = tuple((layer.keys, layer.values) for layer in past.layers) if at == 0 else past
            assert isinstance(past, tuple)
        at += length
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)


def test_tuple_caches_are_not_changed():
    model, tokens = tiny(), ids(2, 9)
    with torch.no_grad():
        past = model(tokens[:, :8], use_cache=True).past_key_values
    pairs = [(layer.keys.clone(), layer.values.clone()) for layer in past.layers]
    kept = copy.deepcopy(pairs)
    first = model(tokens[:, 8:], past_key_values=pairs, use_cache=True)
    second = model(tokens[:, 8:], past_key_values=pairs, use_cache=True)
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(a, b) for p, q in zip(pairs, kept, strict=True) for a, b in zip(p, q, strict=True))


def test_an_encoder_decoder_cache_lets_chunks_cut_the_query_block():
    """Vision states are projected once, in the first chunk; later chunks read them from the cache."""
    model, tokens, vision = tiny(), ids(2, 10), vision_of(2)
    whole = model(tokens, vision_hidden_states=vision, use_cache=False).logits
    cache, parts, at = EncoderDecoderCache(DynamicCache(), DynamicCache()), [], 0
    for length in (2, 3, 4, 1):
        given = vision if at == 0 else None
        parts.append(
            model(tokens[:, at : at + length], vision_hidden_states=given, past_key_values=cache, use_cache=True).logits
        )
        at += length
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)
    kept = [layer.keys.shape[2] for layer in cache.cross_attention_cache.layers if layer.is_initialized]
    assert kept == [5, 5]  # layers 0 and 2
    with pytest.raises(ValueError, match="cut the block of 6 query tokens"):
        model(
            tokens[:, :3],
            vision_hidden_states=vision,
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            use_zero_attention_mask=True,
        )


def test_a_kept_projection_serves_another_prompt(monkeypatch):
    """The same image with other texts: the projected vision states are reused, for every text of the image."""
    model, vision = tiny(), vision_of(1)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    model(ids(1, 8), vision_hidden_states=vision, past_key_values=cache)
    calls = []
    for layer in model.model.layers:
        if layer.cross_attn is not None:
            layer.cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    tokens = ids(3, 9)
    again = EncoderDecoderCache(DynamicCache(), cache.cross_attention_cache)
    got = model(tokens, repeat_time=3, past_key_values=again).logits
    assert not calls
    torch.testing.assert_close(got, model(tokens, vision_hidden_states=vision, repeat_time=3).logits)


# ---- generation ----


def continued(model, tokens, new, mask=None, **call):
    """Tokens that a full pass without a cache would pick after each prefix, and the full logits."""
    full = torch.cat([tokens, new], 1)
    if mask is not None:
        ones = torch.ones_like(new)
        mask = torch.cat([mask, ones], 1)
        call["position_ids"] = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    logits = model(full, attention_mask=mask, use_cache=False, **call).logits
    return logits[:, tokens.shape[1] - 1 : -1].argmax(-1)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_greedy_generation_equals_re_encoding(options):
    model, tokens, vision = tiny(), ids(3, 10), vision_of(3)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1, N : N + 2] = 0
    call = {"vision_hidden_states": vision, "use_zero_attention_mask": True}
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, **call, **options)
    assert torch.equal(out[:, :10], tokens)
    assert torch.equal(out[:, 10:], continued(model, tokens, out[:, 10:], mask, **call))
    embeds = model.get_input_embeddings()(tokens)
    new = model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, do_sample=False, **call, **options
    )
    assert torch.equal(new[:, -6:], out[:, 10:])


def test_left_padded_text_generates_as_without_padding():
    model, text = tiny(), ids(1, 4)
    alone = model.generate(text, max_new_tokens=5, do_sample=False)[:, 4:]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), text], 1)
    both = torch.cat([padded, ids(1, 7)])
    out = model.generate(both, attention_mask=padded_left(2, 7, 3), max_new_tokens=5, do_sample=False)
    assert torch.equal(out[:1, 7:], alone)


def test_beams_sampling_and_repeated_texts():
    model, tokens, vision = tiny(), ids(4, 9), vision_of(2)
    tiled = {"vision_hidden_states": vision.repeat(2, 1, 1)}
    repeated = {"vision_hidden_states": vision, "repeat_time": 2}
    for options in ({"num_beams": 3, "do_sample": False}, {"num_beams": 2, "num_return_sequences": 2}):
        torch.manual_seed(1)
        want = model.generate(tokens, max_new_tokens=4, **options, **tiled)
        torch.manual_seed(1)
        assert torch.equal(model.generate(tokens, max_new_tokens=4, **options, **repeated), want)
        assert want.shape == (4 * options.get("num_return_sequences", 1), 13)
    cached = model.generate(tokens, max_new_tokens=4, num_beams=3, do_sample=False, **tiled)
    plain = model.generate(tokens, max_new_tokens=4, num_beams=3, do_sample=False, use_cache=False, **tiled)
    assert torch.equal(cached, plain)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(model.generate(tokens, max_new_tokens=4, do_sample=True, top_k=5, **tiled))
    assert torch.equal(*draws)


def test_prompt_lookup_equals_greedy():
    model, tokens = tiny(eos_token_id=1), ids(1, 3).repeat(1, 4)  # 4.57 wants an end token here
    want = model.generate(tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3), want)
