"""torch.compile: a forward is one graph; a decoding step on a static cache is one too, whatever the cache holds."""

import pytest
import torch
from internvl_kernels.models import hf_attention
from internvl_kernels.models.prefix_lm import convert_hf_causal_lm_to_prefix_lm, prompt
from transformers import StaticCache

from tests import llava_models
from tests.hf_models import CONFIGS, TRANSFORMERS_5, model_of
from tests.test_models_mpt import tiny_model

# Of transformers 4 the caches are tested without a compiler: they find their length by counting what is not zero.
pytestmark = pytest.mark.skipif(not TRANSFORMERS_5, reason="compiled steps need the static caches of transformers 5")
START, TOTAL = 8, 13


def tokens():
    return torch.randint(2, 40, (2, TOTAL), generator=torch.Generator().manual_seed(0))


def masks(prefix: str | None) -> dict:
    """Row 1 is padded on the left; the prompt is the prefix, with a hole."""
    real = torch.ones(2, TOTAL, dtype=torch.long)
    real[1, :2] = 0
    opened = (torch.arange(TOTAL) < START).long().expand(2, -1).clone()
    opened[0, 3] = 0
    return {"attention_mask": real, **({prefix: opened} if prefix else {})}


def until(given: dict, end: int) -> dict:
    return {name: mask[:, :end] for name, mask in given.items()}


def check(model, cache, given: dict, positions: bool = True) -> None:
    """Compiled steps of one token on ``cache`` give the logits of one pass over everything."""
    torch._dynamo.reset()  # models share code, and with it a limit of graphs
    ids, graphs = tokens(), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(model.forward, backend=backend, fullgraph=True)
    at = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    where = (lambda a, b: {"position_ids": at[:, a:b]}) if positions else (lambda a, b: {})
    with torch.no_grad():
        whole = model(ids, use_cache=False, **given, **where(0, TOTAL)).logits
        model(ids[:, :START], past_key_values=cache, use_cache=True, **until(given, START), **where(0, START))
        for i in range(START, TOTAL):
            now = {"past_key_values": cache, "use_cache": True, **until(given, i + 1), **where(i, i + 1)}
            logits = step(ids[:, i : i + 1], **now).logits
            torch.testing.assert_close(logits[:, 0], whole[:, i], atol=5e-5 * float(whole.abs().max()), rtol=0)
    assert graphs and len(graphs) <= 3, len(graphs)  # fixed lengths, then any


@pytest.mark.parametrize("name", ["gpt2", "bloom", "mistral", "llama"])
def test_prefix_lms(name):
    model = convert_hf_causal_lm_to_prefix_lm(model_of(name))
    cache = prompt.full_cache(model, {"cache_implementation": "static", "max_new_tokens": 8}, START)
    check(model, cache, masks("bidirectional_mask"), positions=name != "bloom")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unmodified_models(name):
    model = model_of(name, hf_attention.register())
    check(model, StaticCache(config=model.config, max_cache_len=16), masks(None))


@pytest.mark.parametrize("prefix", [None, "prefix_mask"])
def test_mpt(prefix):
    model = tiny_model(alibi=True, prefix_lm=prefix is not None)
    check(model, StaticCache(config=model.config, max_cache_len=16), masks(prefix), positions=False)


@pytest.mark.parametrize("kind", llava_models.KINDS)
@pytest.mark.parametrize("prefix", [None, "prefix_mask"])
def test_llava_text(kind, prefix):
    model = llava_models.model_of(kind, mm_prefix="prompt" if prefix else None)
    check(model, StaticCache(config=model.config, max_cache_len=16), masks(prefix), positions=False)


# ---- forward ----


def one_graph(model, **given) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    with torch.no_grad():
        want, got = (
            model(tokens(), use_cache=False, **given).logits,
            compiled(tokens(), use_cache=False, **given).logits,
        )
    torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=0)


FEW = ("gpt2", "bloom", "llama")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in CONFIGS])
def test_a_prefix_lm_is_one_graph(name):
    one_graph(convert_hf_causal_lm_to_prefix_lm(model_of(name)), **masks("bidirectional_mask"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_unmodified_model_is_one_graph(name):
    one_graph(model_of(name, hf_attention.register()), **masks(None))


def test_a_window_of_an_unmodified_model_breaks_the_graph_and_changes_nothing():
    """Its mask function has state that a tracer cannot compare."""
    torch._dynamo.reset()
    model = model_of("mistral", hf_attention.register())
    given = {"use_cache": False, **masks(None)}
    compiled = torch.compile(model, backend="eager", dynamic=True)
    torch.testing.assert_close(compiled(tokens(), **given).logits, model(tokens(), **given).logits)


@pytest.mark.slow
def test_images_break_the_graph_and_change_nothing():
    """How many tokens a picture's place becomes depends on the ids."""
    torch._dynamo.reset()
    model = llava_models.model_of("llama", mm_prefix="prompt")
    ids = tokens()
    ids[:, 3] = -200
    given = {"images": torch.rand(2, 3, 16, 16), "labels": torch.where(torch.arange(TOTAL) < START, -100, ids)}
    compiled = torch.compile(model, backend="eager", dynamic=True)
    torch.testing.assert_close(compiled(ids, **given).logits, model(ids, **given).logits)
