"""Wrong input of every model: a ValueError that names the place and what is expected, before any work."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from tests import llava_models
from tests.qllama_models import tiny
from tests.test_models_mpt import EmbeddingLM, tiny_model

IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10], [13, 14, 15, 16, 17, 18, 19, 20]])


def cache_of(layers, batch, heads, head_dim):
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.randn(batch, heads, 5, head_dim), torch.randn(batch, heads, 5, head_dim), layer)
    return cache


def both_halves(*sizes):
    return EncoderDecoderCache(cache_of(*sizes), DynamicCache())


def pairs(batch, width):
    return [(torch.randn(batch, 5, width), torch.randn(batch, 5, width))] * 2


def at(values, place, value):
    changed = values.clone()
    changed[place] = value
    return changed


TOKENS = [
    ({"input_ids": at(IDS, (1, 3), 77)}, r"input_ids\[1, 3\] is 77; (allowed|expected):? 0 to"),
    ({"input_ids": at(IDS, (0, 2), -1)}, r"input_ids\[0, 2\] is -1"),
    ({"input_ids": IDS[0]}, r"input_ids"),
    ({"input_ids": None}, "input_ids"),
    ({"labels": IDS[:, :3]}, r"labels has shape \[2, 3\]"),
    ({"labels": at(IDS, (1, 4), 77)}, r"labels\[1, 4\] is 77; allowed: 0 to \d+, and -100 for what is not learned"),
    ({"labels": at(IDS, (0, 1), -7)}, r"labels\[0, 1\] is -7"),
]
CACHES = {  # made for the layers, heads and head dim of a model, but wrong in one of them
    "heads": (lambda n, h, d: cache_of(n, 2, h + 1, d), "key has shape|holds tensors of shape"),
    "head dim": (lambda n, h, d: cache_of(n, 2, h, 2 * d), "key has shape|holds tensors of shape"),
    "batch": (lambda n, h, d: cache_of(n, 3, h, d), "key has shape|holds tensors of shape"),
    "more layers": (lambda n, h, d: cache_of(n + 1, 2, h, d), r"[34] layers; this model has [23]"),
    "fewer layers": (lambda n, h, d: cache_of(n - 1, 2, h, d), r"[12] layers; this model has [23]"),
    "text": (lambda n, h, d: "a cache", "past_key_values is a str"),
    "dict": (lambda n, h, d: {0: 1}, "past_key_values is a dict"),
}
# kind -> (model, layers, key-value heads, head dim)
MODELS = {
    "mpt": (lambda: tiny_model(alibi=True), 2, 6, 4),
    "qllama": (tiny, 3, 2, 8),
    "llava llama": (lambda: llava_models.model_of("llama"), 2, 2, 8),
    "llava mpt": (lambda: llava_models.model_of("mpt"), 2, 4, 8),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("change", "message"), TOKENS)
def test_tokens_and_labels(kind, change, message):
    with pytest.raises(ValueError, match=message):
        MODELS[kind][0]()(**{"input_ids": IDS, **change})


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("wrong", CACHES)
def test_caches_of_something_else(kind, wrong):
    model, *sizes = MODELS[kind]
    make, message = CACHES[wrong]
    with pytest.raises(ValueError, match=message):
        model()(input_ids=IDS[:, :1], past_key_values=make(*sizes), use_cache=True)


@pytest.mark.parametrize("kind", MODELS)
def test_a_static_cache_without_room(kind):
    model = MODELS[kind][0]()
    with pytest.raises(ValueError, match="has room for 6 tokens and holds 0; 8 more do not fit"):
        model(input_ids=IDS, past_key_values=StaticCache(config=model.config, max_cache_len=6), use_cache=True)


def test_mpt_alone():
    model, embeds = tiny_model(alibi=True), tiny_model(EmbeddingLM, alibi=True)
    with pytest.raises(ValueError, match=r"inputs_embeds has shape \[2, 6, 20\]; expected \[batch, tokens, 24\]"):
        embeds(inputs_embeds=torch.randn(2, 6, 20))
    with pytest.raises(ValueError, match="EncoderDecoderCache; allowed: a transformers Cache of one decoder"):
        model(IDS, past_key_values=both_halves(2, 2, 6, 4))
    for wrong in (pairs(2, 7), pairs(3, 24)):
        with pytest.raises(ValueError, match=r"layer 0: value has shape .* expected batch 2, 6 key-value"):
            model(IDS[:, :1], past_key_values=wrong)


def test_vision_states_that_a_cache_waits_for():
    with pytest.raises(ValueError, match="vision_hidden_states is None and past_key_values, an EncoderDecoderCache"):
        tiny()(IDS, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()), use_cache=True)


@pytest.mark.parametrize("kind", llava_models.KINDS)
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 3, 16, 16).numpy(), "images is a ndarray; expected a tensor or a list of tensors"),
        ("cat.png", "images is a str"),
        (["cat.png"], "images is a list of str"),
        (torch.rand(3, 16, 16), "expected"),
    ],
    ids=["array", "path", "paths", "one picture"],
)
def test_images_that_are_none(kind, images, message):
    with pytest.raises(ValueError, match=message):
        llava_models.model_of(kind)(**{**llava_models.batch(), "images": images})
