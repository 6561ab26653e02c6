"""Q-LLaMA at run time: checkpointing, threads, compilation, half precision."""

import copy
import threading

import pytest
import torch
from internvl_kernels.models.qllama import LlamaModel
from transformers import StaticCache

from tests.qllama_models import WIDTH, N, ids, padded_left, tiny, vision_of


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- training ----


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["inputs_with_grad", "frozen_inputs"])
@pytest.mark.parametrize("method", ["forward", "forward_train"])
def test_checkpointing_gives_the_same_gradients(reentrant, frozen, method):
    """The vision states are no leaf: they come from a trained encoder, and several layers read them."""
    model, encoder = tiny(LlamaModel).train(), torch.nn.Linear(7, WIDTH)
    embeds, pixels = torch.randn(2, 9, 32, requires_grad=not frozen), torch.randn(2, 5, 7)

    def gradients():
        model.zero_grad(), encoder.zero_grad()
        embeds.grad = None
        call = {} if method == "forward_train" else {"use_zero_attention_mask": True}
        out = getattr(model, method)(inputs_embeds=embeds, vision_hidden_states=encoder(pixels), **call)
        assert (out.past_key_values is None) == model.gradient_checkpointing
        out.last_hidden_state.square().sum().backward()
        grads = [p.grad.clone() for p in (*model.layers.parameters(), *encoder.parameters())]
        return grads if frozen else [*grads, embeds.grad.clone()]

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for got, want in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(got, want)
    model.gradient_checkpointing_disable()
    assert not model.gradient_checkpointing
    model.gradient_checkpointing = True  # by hand, as the original's scripts do
    for got, want in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(got, want)
    assert embeds.requires_grad is not frozen


def test_threads_share_a_model():
    model, vision = tiny(), vision_of(1)
    prompts = [ids(1, 7 + i) for i in range(4)]
    call = {"vision_hidden_states": vision, "use_zero_attention_mask": True, "use_cache": False}
    with torch.no_grad():
        wanted = [model(p, **call).logits for p in prompts]
        found = [None] * 4

        def work(i):
            with torch.no_grad():
                for _ in range(3):
                    found[i] = model(prompts[i], **call).logits

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# ---- compilation, precision ----


def test_compiles_in_one_graph_for_every_length():
    model = tiny(LlamaModel, num_hidden_layers=1)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 9), (3, 12)):
            call = {
                "inputs_embeds": torch.randn(batch, length, 32),
                "attention_mask": padded_left(batch, length, 2),
                "vision_hidden_states": vision_of(batch),
                "use_zero_attention_mask": True,
                "use_cache": False,
            }
            got, want = compiled(**call).last_hidden_state, model(**call).last_hidden_state
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert len(graphs) <= 2


@pytest.mark.slow
def test_compiled_training_step_equals_eager():
    model = tiny(LlamaModel, num_hidden_layers=1).train()
    embeds, vision = torch.randn(2, 9, 32), vision_of(2)

    def gradients(run):
        model.zero_grad()
        run(inputs_embeds=embeds, vision_hidden_states=vision, use_cache=False).last_hidden_state.sum().backward()
        return [p.grad.clone() for p in model.layers.parameters()]

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for got, want in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_compiled_step_on_a_static_cache_is_reused():
    """One graph serves every decoding step: nothing in it depends on how far the cache is filled."""
    model, tokens, vision = tiny(num_hidden_layers=1), ids(2, 12), vision_of(2)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, N : N + 1] = 0
    whole = model(tokens, attention_mask=mask, vision_hidden_states=vision, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(model.forward, backend=backend, fullgraph=True)
    over_buffer = torch.nn.functional.pad(mask, (0, 4))
    with torch.no_grad():
        model(tokens[:, :8], attention_mask=mask[:, :8], vision_hidden_states=vision, past_key_values=cache)
        for at in range(8, 12):
            logits = step(
                tokens[:, at : at + 1],
                attention_mask=over_buffer,
                position_ids=torch.full((2, 1), at),
                vision_hidden_states=vision,
                past_key_values=cache,
            ).logits
            torch.testing.assert_close(logits[:, 0], whole[:, at], atol=2e-5, rtol=1e-4)
    assert len(graphs) <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model, tokens, vision = tiny(), ids(2, 10), vision_of(2)
    call = {"use_zero_attention_mask": True, "labels": tokens}
    exact = model(tokens, vision_hidden_states=vision, **call)
    half = copy.deepcopy(model).to(dtype)
    got = half(tokens, vision_hidden_states=vision.to(dtype), **call)
    assert got.logits.dtype == dtype and got.loss.dtype == torch.float32
    bound = 0.2 if dtype == torch.bfloat16 else 0.03
    assert float((got.logits.float() - exact.logits).abs().max()) < bound * float(exact.logits.abs().max())
    new = half.generate(tokens, vision_hidden_states=vision.to(dtype), max_new_tokens=3, do_sample=False)
    assert new.shape == (2, 13)
    with torch.autocast("cpu", dtype):
        mixed = model(tokens, vision_hidden_states=vision, **call)
    mixed.loss.backward()
    assert float((mixed.logits.float() - exact.logits).abs().max()) < bound * float(exact.logits.abs().max())
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
