"""Q-LLaMA at run time: caches, generation, checkpointing, compilation, half precision, files, refusals."""

import copy
import threading

import pytest
import torch
from internvl_kernels.models import qllama
from internvl_kernels.models.qllama import LlamaForCausalLM, LlamaModel, QLlamaConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, EncoderDecoderCache, StaticCache

from tests.test_models_qllama import VOCAB, WIDTH, N, ids, padded_left, tiny


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def vision_of(batch):
    return torch.randn(batch, 5, WIDTH)


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


# ---- files ----


def test_auto_classes_read_what_was_saved(tmp_path):
    model, tokens, vision = tiny(num_key_value_heads=4), ids(2, 9), vision_of(2)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, QLlamaConfig)
    assert (config.num_query_token, config.vision_hidden_size, config.cross_attention_frequency) == (N, WIDTH, 2)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is LlamaForCausalLM
    assert torch.equal(
        again(tokens, vision_hidden_states=vision).logits, model(tokens, vision_hidden_states=vision).logits
    )
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    model.model.save_pretrained(tmp_path / "inner")
    assert type(AutoModel.from_pretrained(tmp_path / "inner")) is LlamaModel


def test_state_dict_keys_are_the_originals():
    layer = {f"self_attn.{p}_proj.weight" for p in "qkvo"} | {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    layer |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    cross = {f"cross_attn.{p}.weight" for p in ("norm1", "norm2", "q_proj", "k_proj", "v_proj", "o_proj")}
    wanted = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    wanted |= {f"model.layers.{i}.{key}" for i in range(3) for key in layer | (cross if i % 2 == 0 else set())}
    assert set(tiny().state_dict()) == wanted


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_resized_tables(tied, tmp_path):
    model = tiny(tie_word_embeddings=tied)
    model.resize_token_embeddings(VOCAB + 3)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert torch.equal(again.lm_head.weight, model.lm_head.weight) and again.config.vocab_size == VOCAB + 3


def test_outputs_asked_for_in_the_configuration():
    model = tiny(output_hidden_states=True)
    assert len(model(ids(1, 4)).hidden_states) == 4
    assert model(ids(1, 4), output_hidden_states=False).hidden_states is None


def test_faulty_checkpoints_are_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    faults = {
        "model.layers.0.cross_attn.k_proj.weight": lambda w, key: w.pop(key),
        "model.layers.1.extra.weight": lambda w, key: w.update({key: torch.zeros(2)}),
        "model.norm.weight": lambda w, key: w.update({key: torch.zeros(3)}),
    }
    for key, damage in faults.items():
        weights = dict(whole)
        damage(weights, key)
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            LlamaForCausalLM.from_pretrained(tmp_path)
    del whole["model.norm.weight"]
    save_file(whole, file, metadata={"format": "pt"})
    partial, info = LlamaForCausalLM.from_pretrained(tmp_path, strict=False, output_loading_info=True)
    assert list(info["missing_keys"]) == ["model.norm.weight"] and bool((partial.model.norm.weight == 1).all())
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="unreadable"):
        LlamaForCausalLM.from_pretrained(tmp_path)


# ---- refusals ----


@pytest.mark.parametrize(
    "change,message",
    [
        ({"vision_hidden_states": torch.zeros(2, 5, WIDTH + 1)}, r"\[2, 5, 21\].*vision_hidden_size = 20"),
        ({"vision_hidden_states": torch.zeros(3, 5, WIDTH)}, "3 images with repeat_time=1; the 2 texts"),
        ({"vision_hidden_states": torch.zeros(5, WIDTH)}, "vision_hidden_states has shape"),
        ({"vision_hidden_states": None, "repeat_time": 2}, "repeat_time is 2 without vision_hidden_states"),
        ({"repeat_time": 0}, "repeat_time is 0"),
        ({"attention_mask": torch.ones(2, 8)}, "attention_mask is torch.float32"),
        ({"attention_mask": torch.ones(2, 8, dtype=torch.long)}, r"attention_mask has shape \[2, 8\].*\[2, 9\]"),
        ({"attention_mask": torch.zeros(2, 1, 9, 9)}, "forward_train takes additive"),
        ({"position_ids": torch.zeros(2, 8, dtype=torch.long)}, "position_ids has shape"),
        ({"inputs_embeds": torch.zeros(2, 9, 32)}, "both of input_ids and inputs_embeds"),
        ({"input_ids": None}, "neither of input_ids"),
        ({"input_ids": torch.tensor([[3, 4], [5, -200]])}, r"input_ids\[1, 1\] is -200; expected 0 to 49"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 9, 31)}, "hidden_size = 32"),
        ({"labels": torch.zeros(2, 8, dtype=torch.long)}, "labels has shape"),
        ({"past_key_values": object()}, "past_key_values is a object"),
        ({"past_key_values": [()]}, "past_key_values holds 1 layers; this model has 3"),
        (
            {"past_key_values": [(torch.zeros(2, 4, 3, 8),) * 2] * 3},
            r"\[2, 4, 3, 8\]; expected .* = \[2, 2, tokens, 8\]",
        ),
        ({"past_key_values": [(torch.zeros(2, 4, 3),) * 2] * 3}, "no pair of tensors"),
    ],
)
def test_wrong_input_names_what_was_found(change, message):
    call = {"input_ids": ids(2, 9), "vision_hidden_states": vision_of(2), **change}
    with pytest.raises(ValueError, match=message):
        tiny()(**call)


def test_caches_of_other_models_are_refused():
    model = tiny()
    other = tiny(num_key_value_heads=4, num_hidden_layers=2)
    cache = other(ids(2, 8), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"layer 0 holds tensors of shape \[2, 4, 8, 8\]"):
        model(ids(2, 1), past_key_values=cache)
    cache = model(ids(3, 8), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"shape \[3, 2, 8, 8\]; expected .* \[2, 2, tokens, 8\]"):
        model(ids(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="inside the block of 6 query tokens"):
        past = model(ids(2, 3), use_cache=True).past_key_values
        model(ids(2, 8), vision_hidden_states=vision_of(2), past_key_values=past)


def test_a_full_static_cache_is_refused():
    model = tiny()
    cache = StaticCache(config=model.config, max_cache_len=10)
    model(ids(2, 8), past_key_values=cache)
    with pytest.raises(ValueError, match="room for 10 tokens and holds 8; 3 more do not fit"):
        model(ids(2, 3), past_key_values=cache)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"num_query_token": -1}, "num_query_token is -1"),
        ({"cross_attention_frequency": 0}, "cross_attention_frequency is 0"),
        ({"vision_hidden_size": 1.5}, "vision_hidden_size is 1.5"),
        ({"num_attention_heads": 5}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    ],
)
def test_configurations_are_checked(change, message):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(ValueError, match=message):
        QLlamaConfig(**{**sizes, **change})


def test_standalone_parts_take_the_originals_arguments():
    config = QLlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, vision_hidden_size=WIDTH)
    attention = qllama.LlamaAttention(config).eval()
    x = torch.randn(2, 5, 32)
    mask = qllama._make_causal_mask((2, 5), x.dtype, x.device)
    out, weights, past = attention(x, mask, output_attentions=True, use_cache=True)
    assert weights.shape == (2, 4, 5, 5) and past[0].shape == (2, 4, 5, 8)
    plain, none, _ = attention(x, mask)
    assert none is None
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-4)
    step, _, past = attention(x[:, :1], None, past_key_value=past, use_cache=True)
    assert past[0].shape[2] == 6 and step.shape == (2, 1, 32)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 1, 5, 4\]; expected .* \[2, 1, 5, 5\]"):
        attention(x, mask[..., :4])
    layer = qllama.LlamaDecoderLayer(config, use_cross_attn=True).eval()
    assert layer(x, None, mask)[0].shape == (2, 5, 32)
    dropping = qllama.LlamaAttention(QLlamaConfig(**{**config.to_dict(), "attention_dropout": 0.5})).train()
    with pytest.raises(NotImplementedError, match=r"attention_dropout is 0\.5"):
        dropping(x)
