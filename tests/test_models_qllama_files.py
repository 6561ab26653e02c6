"""Q-LLaMA files, and what its classes refuse."""

import pytest
import torch
from internvl_kernels.models import qllama
from internvl_kernels.models.qllama import LlamaForCausalLM, LlamaModel, QLlamaConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache

from tests.qllama_models import VOCAB, WIDTH, N, ids, tiny, vision_of


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
