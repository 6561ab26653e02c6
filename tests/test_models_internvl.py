"""The InternVL-14B wrapper against recorded cases and the same arithmetic written out."""

import builtins
import runpy
from pathlib import Path

import pytest
import torch
from internvl_kernels.models.internvl_14b import (
    AttentionPoolingBlock,
    CrossAttention,
    InternVisionConfig,
    InternVLConfig,
    InternVLModel,
)
from safetensors import safe_open
from transformers import AutoModel

from tests.golden import case_ids, replay
from tests.test_models_intern_vit import VISION

BANK = Path(__file__).parent / "golden_bank"
QLLAMA = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(**changes):
    torch.manual_seed(7)
    vision = {**VISION, "initializer_range": 0.2}
    config = InternVLConfig(vision_config=vision, qllama_config=QLLAMA, num_query_token=6, **changes)
    model = InternVLModel(config).eval()
    torch.nn.init.normal_(model.query_tokens)
    return model


@pytest.mark.parametrize("case_id", [c for c in case_ids(BANK) if c.startswith("intern")])
def test_golden(case_id):
    outcomes = [outcome for _, outcome in replay(BANK, case_id)]
    assert outcomes
    assert not [f"{outcome.call}: {outcome.problems}" for outcome in outcomes if outcome.problems]


# ---- the wrapper ----


def test_features():
    """Query states read the image; text features are the language model's own, padding hidden."""
    model, images = tiny(), torch.rand(2, 3, 16, 16)
    vision, queries = model.get_image_features(images)
    assert vision.shape == (2, 17, 24) and queries.shape == (2, 6, 32)
    whole, same = model(images, output_hidden_states=True)
    assert torch.equal(whole.last_hidden_state, vision) and torch.equal(same, queries) and len(whole.hidden_states) == 3
    zeros = torch.zeros(2, 1, 6, 6)
    wanted = model.qllama.model.forward_train(
        inputs_embeds=model.query_tokens.repeat(2, 1, 1), vision_hidden_states=vision, attention_mask=zeros
    )
    assert torch.equal(wanted.last_hidden_state, queries)
    assert not torch.allclose(model.get_image_features(images.flip(0))[1], queries)
    text = torch.randint(2, 50, (2, 7))
    mask = torch.ones_like(text)
    mask[0, 4:] = 0
    states = model.get_text_features(text, mask)
    assert states.shape == (2, 7, 32)
    torch.testing.assert_close(states[:1, :4], model.get_text_features(text[:1, :4]), atol=1e-5, rtol=1e-4)


def test_gradients_reach_queries_and_pixels():
    model, images = tiny().train(), torch.rand(2, 3, 16, 16, requires_grad=True)
    model.gradient_checkpointing_enable()
    model.get_image_features(images)[1].square().sum().backward()
    assert bool(images.grad.any()) and bool(model.query_tokens.grad.any())
    assert bool(model.vision_model.encoder.layers[0].attn.qkv.weight.grad.any())


def test_images_of_another_size_need_no_resizing():
    model = tiny(force_image_size=24)
    assert (model.image_size, model.num_patches) == (24, 36)
    images = torch.rand(1, 3, 24, 24)
    before = model(images)[1]
    model.resize_pos_embeddings(16, 24, 4)
    torch.testing.assert_close(model(images)[1], before)


def test_generate_equals_re_encoding():
    model, images, text = tiny(), torch.rand(2, 3, 16, 16), torch.randint(2, 50, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    new = model.generate(images, text, mask, max_new_tokens=5, do_sample=False)
    assert new.shape == (2, 5)
    vision = model.vision_model(images).last_hidden_state
    for row in range(2):
        real = text[row : row + 1, mask[row] == 1]
        embeds = model.get_input_embeddings()(torch.cat([real, new[row : row + 1]], 1))
        logits = model.qllama(
            inputs_embeds=torch.cat([model.query_tokens, embeds], 1),
            vision_hidden_states=vision[row : row + 1],
            use_zero_attention_mask=True,
        ).logits
        assert torch.equal(logits[:, -6:-1].argmax(-1), new[row : row + 1])
    assert torch.equal(model.generate(None, text, mask, visual_features=vision, max_new_tokens=5, do_sample=False), new)
    for options in ({"cache_implementation": "static", "do_sample": False}, {"use_cache": False, "do_sample": False}):
        assert torch.equal(model.generate(images, text, mask, max_new_tokens=5, **options), new)
    beams = model.generate(images, text, mask, max_new_tokens=5, num_beams=3, num_return_sequences=2)
    assert beams.shape == (4, 5)


def test_files_are_read_back(tmp_path):
    model, images = tiny(), torch.rand(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())  # transformers' own 'internvl' renames nothing here
    again = InternVLModel.from_pretrained(tmp_path).eval()
    assert again.config.qllama_config.num_query_token == 6 and again.config.hidden_size == 32
    assert torch.equal(model(images)[1], again(images)[1])
    assert InternVisionConfig.from_pretrained(tmp_path).hidden_size == 24
    half = InternVLModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(images)[1].dtype == torch.bfloat16
    model.vision_model.save_pretrained(tmp_path / "vision")
    vision = AutoModel.from_pretrained(tmp_path / "vision").eval()
    assert torch.equal(vision(images).last_hidden_state, model.vision_model(images).last_hidden_state)
    model.resize_token_embeddings(53)
    model.save_pretrained(tmp_path / "resized")
    assert InternVLModel.from_pretrained(tmp_path / "resized").qllama.lm_head.weight.shape == (53, 32)
    state = {k: v for k, v in model.state_dict().items() if k != "query_tokens"}
    model.save_pretrained(tmp_path / "partial", state_dict=state)
    with pytest.raises(ValueError, match=r"1 missing \(query_tokens\)"):
        InternVLModel.from_pretrained(tmp_path / "partial")
    assert not InternVLModel.from_pretrained(tmp_path / "partial", strict=False).query_tokens.any()


@pytest.mark.parametrize(
    "call,message",
    [
        ({"pixel_values": None}, "pixel_values and visual_features are None"),
        ({"input_ids": torch.zeros(3, 4, dtype=torch.long)}, r"input_ids has shape \[3, 4\]; expected \[2, tokens\]"),
        ({"attention_mask": torch.ones(2, 3, dtype=torch.long)}, r"attention_mask has shape \[2, 3\]"),
        ({"visual_features": torch.zeros(2, 5, 23)}, "vision_hidden_size = 24"),
    ],
)
def test_wrong_prompts_name_what_was_found(call, message):
    given = {"pixel_values": torch.rand(2, 3, 16, 16), "input_ids": torch.ones(2, 4, dtype=torch.long), **call}
    with pytest.raises(ValueError, match=message):
        tiny().generate(**given, max_new_tokens=1)
    with pytest.raises(ValueError, match="pixel_values is None"):
        tiny()(None)


def test_configurations_are_their_own():
    vision, qllama = dict(VISION), dict(QLLAMA)
    config = InternVLConfig(vision_config=vision, qllama_config=qllama, num_query_token=6)
    assert vision == VISION and qllama == QLLAMA
    assert (config.qllama_config.num_query_token, config.qllama_config.vision_hidden_size) == (6, 24)
    again = InternVLConfig(config.vision_config, config.qllama_config, num_query_token=9)
    assert config.qllama_config.num_query_token == 6 and again.qllama_config.num_query_token == 9
    assert InternVLConfig(**config.to_dict()).to_dict() == config.to_dict()
    defaults = InternVLConfig()
    assert (defaults.vision_config.hidden_size, defaults.qllama_config.vision_hidden_size) == (3200, 3200)
    with pytest.raises(ValueError, match=r"vision_hidden_size is 20; vision_config\.hidden_size is 24"):
        InternVLConfig(vision_config=VISION, qllama_config={**QLLAMA, "vision_hidden_size": 20})
    with pytest.raises(ValueError, match="transformers' InternVL, another model"):
        InternVLConfig(vision_config=VISION, text_config={"hidden_size": 8})
    with pytest.raises(ValueError, match="hidden_size is 25; it must be a multiple of num_attention_heads = 3"):
        InternVisionConfig(**{**VISION, "hidden_size": 25})


# ---- LoRA, pooling ----


def test_lora_trains_the_named_projections_only(tmp_path):
    pytest.importorskip("peft")
    model, images = tiny(use_backbone_lora=4, use_qllama_lora=4).train(), torch.rand(1, 3, 16, 16)
    plain = tiny().eval()
    plain.query_tokens = model.query_tokens
    torch.testing.assert_close(model.eval()(images)[1], plain(images)[1])  # adapters start at zero
    found = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    vision = {name for name in found if name.startswith("vision_model")}
    text = found - vision
    assert len(vision) == 2 * 4 and len(text) == 3 * 7
    assert {name.split(".")[-1] for name in vision} == {"qkv", "proj", "fc1", "fc2"}
    assert not any("cross_attn" in name for name in text)
    model.train()(images)[1].square().sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert touched and all("lora_B" in name or name == "query_tokens" for name in touched)
    model.save_pretrained(tmp_path)
    again = InternVLModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(images)[1], model.eval()(images)[1])
    new = model.generate(images, torch.randint(2, 50, (1, 4)), max_new_tokens=3, do_sample=False)
    assert new.shape == (1, 3) and model.get_text_features(torch.randint(2, 50, (1, 4))).shape == (1, 4, 32)
    model.resize_pos_embeddings(16, 24, 4)


def test_lora_without_peft_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    model = tiny()
    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(ImportError, match="pip install peft"):
        model.wrap_qllama_lora()
    with pytest.raises(ValueError, match="the LoRA rank is 0"):
        model.wrap_backbone_lora(r=0)


def test_pooling_takes_gradients_and_checks():
    block, x = AttentionPoolingBlock(24, 3, qkv_bias=True, out_dim=10), torch.randn(2, 7, 24, requires_grad=True)
    out = block(x)
    assert out.shape == (2, 10)
    out.sum().backward()
    assert bool(x.grad.any()) and bool(block.cross_attn.v_bias.grad.any())
    assert CrossAttention(24, 3)(torch.randn(2, 5, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 24)).shape == (
        2,
        5,
        24,
    )
    with pytest.raises(ValueError, match="dim is 25"):
        CrossAttention(25, 3)
    with pytest.raises(NotImplementedError, match=r"attn_drop is 0\.5"):
        CrossAttention(24, 3, attn_drop=0.5).train()(torch.randn(1, 2, 24))
    with pytest.raises(NotImplementedError, match=r"drop_path is 0\.1"):
        AttentionPoolingBlock(24, 3, drop_path=0.1)


def test_the_example_runs(tmp_path, capsys):
    example = runpy.run_path(Path(__file__).parents[1] / "examples" / "qllama_features.py")
    share = example["main"](["--steps", "2", "--save", str(tmp_path)])
    assert 0 <= share <= 1
    assert "the right caption was nearest for" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").exists()
    with pytest.raises(SystemExit):
        example["main"](["--help"])
    assert "--steps" in capsys.readouterr().out
