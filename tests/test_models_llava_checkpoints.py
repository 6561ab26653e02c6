"""LLaVA checkpoints, setup helpers, prompts and towers."""

from types import SimpleNamespace

import pytest
import torch
from internvl_kernels.models.llava import (
    LlavaLlamaForCausalLM,
    LlavaMptForCausalLM,
    build_vision_tower,
    tokenizer_image_token,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from tests.llava_models import IMG, KINDS, TOWER, batch, model_of

CLASSES = {"llama": LlavaLlamaForCausalLM, "mpt": LlavaMptForCausalLM}
TOWER_FIELDS = {key: value for key, value in TOWER.items() if key != "model_type"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_brings_everything_back(tmp_path, kind):
    model, data = model_of(kind, mm_prefix="images"), batch()
    wanted = model(**data).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is CLASSES[kind] and loaded.config.mm_prefix == "images"
    assert torch.equal(loaded(**data).logits, wanted)
    assert not any(p.requires_grad for p in loaded.get_vision_tower().parameters())
    half = CLASSES[kind].from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(**data).logits.dtype == torch.bfloat16
    eager = {"attn_implementation": "eager"} if kind == "llama" else {}
    torch.testing.assert_close(CLASSES[kind].from_pretrained(tmp_path, **eager)(**data).logits, wanted, atol=1e-4,
                               rtol=1e-3)  # fmt: skip


def test_a_tower_in_the_checkpoint_counts_also_when_only_a_path_describes_it(tmp_path):
    """As LLaVA writes them: ``mm_vision_tower`` names a folder, the weights of the (tuned) tower are in the file."""
    CLIPVisionModel(CLIPVisionConfig(**TOWER_FIELDS)).save_pretrained(tmp_path / "clip")
    model, data = model_of("llama"), batch()
    wanted = model(**data).logits
    model.save_pretrained(tmp_path / "llava")
    model.config.mm_vision_config, model.config.mm_vision_tower = None, str(tmp_path / "clip")
    model.config.save_pretrained(tmp_path / "llava")
    assert torch.equal(LlavaLlamaForCausalLM.from_pretrained(tmp_path / "llava")(**data).logits, wanted)
    file = tmp_path / "llava" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "vision_tower" not in k}, file, {"format": "pt"})
    without = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "llava")
    with pytest.raises(RuntimeError, match="call load_model"):
        without(**data)
    without.get_vision_tower().load_model()
    assert without(**data).logits.shape == wanted.shape


@pytest.mark.parametrize("level", ["", "vision_model."])
def test_tower_keys_of_transformers_4_and_5_load(tmp_path, level):
    model, data = model_of("mpt"), batch()
    wanted = model(**data).logits
    model.save_pretrained(tmp_path)
    file, mark = tmp_path / "model.safetensors", "vision_tower.vision_tower."
    plain = {key.replace(mark + "vision_model.", mark): value for key, value in load_file(file).items()}
    save_file({key.replace(mark, mark + level): value for key, value in plain.items()}, file, {"format": "pt"})
    assert torch.equal(LlavaMptForCausalLM.from_pretrained(tmp_path)(**data).logits, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "sentence"),
    [("mm_projector.0.weight", "1 missing"), ("vision_tower.vision_tower", "missing"), ("norm", "missing")],
)
def test_a_partial_checkpoint_is_refused(tmp_path, kind, key, sentence):
    model_of(kind).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if key not in name}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"does not fit .*{sentence} \(.*{key}"):
        CLASSES[kind].from_pretrained(tmp_path)


class Tokenizer:
    """Words are tokens; 1 is the BOS before every text."""

    bos_token_id = 1

    def __init__(self, size=40):
        self.size = size

    def __call__(self, text):
        return SimpleNamespace(input_ids=[1, *(ord(c) % 30 + 2 for c in text if c != " ")])

    def __len__(self):
        return self.size

    def add_tokens(self, tokens, special_tokens=False):
        self.size += len(tokens)
        return len(tokens)


def test_prompts():
    a, b = 97 % 30 + 2, 98 % 30 + 2
    tokenizer = Tokenizer()
    assert tokenizer_image_token("a <image> b", tokenizer) == [1, a, IMG, b]
    assert tokenizer_image_token("<image><image>b", tokenizer) == [1, IMG, IMG, b]
    assert tokenizer_image_token("a<image>", tokenizer) == [1, a, IMG]
    assert tokenizer_image_token("ab", tokenizer, return_tensors="pt").tolist() == [1, a, b]
    tokenizer.bos_token_id = None  # a tokenizer without BOS
    tokenizer.__class__ = type("Plain", (Tokenizer,), {"__call__": lambda _, text: SimpleNamespace(
        input_ids=[ord(c) % 30 + 2 for c in text if c != " "])})  # fmt: skip
    assert tokenizer_image_token("a <image> b", tokenizer) == [a, IMG, b]
    with pytest.raises(ValueError, match="return_tensors is 'np'"):
        tokenizer_image_token("a", tokenizer, return_tensors="np")


def vision_arguments(path, **more):
    fields = {"vision_tower": str(path), "mm_vision_select_layer": -1, "mm_vision_select_feature": "patch"}
    return SimpleNamespace(**{**fields, "mm_projector_type": "mlp2x_gelu", "pretrain_mm_mlp_adapter": None, **more})


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model_becomes_a_llava(tmp_path, kind):
    CLIPVisionModel(CLIPVisionConfig(**TOWER_FIELDS)).save_pretrained(tmp_path)
    model, other = model_of(kind, mm_vision_config=None), model_of(kind, seed=1)
    assert model.get_vision_tower() is None
    model.get_model().initialize_vision_modules(vision_arguments(tmp_path))
    config = model.config
    assert (config.mm_hidden_size, config.mm_projector_type, config.use_mm_proj) == (24, "mlp2x_gelu", True)
    loss = model(**batch()).loss
    assert loss.isfinite()
    prefix = "model." if kind == "llama" else "transformer."
    adapter = {f"{prefix}mm_projector.{k}": v for k, v in other.get_model().mm_projector.state_dict().items()}
    torch.save(adapter, tmp_path / "adapter.bin")
    save_file(adapter, tmp_path / "adapter.safetensors")
    for file in ("adapter.bin", "adapter.safetensors"):
        model.get_model().initialize_vision_modules(vision_arguments(tmp_path, pretrain_mm_mlp_adapter=tmp_path / file))
        assert torch.equal(model.get_model().mm_projector[2].bias, other.get_model().mm_projector[2].bias)
    torch.save({k: v[:5] for k, v in adapter.items()}, tmp_path / "short.bin")
    with pytest.raises(ValueError, match=r"does not fit the projector: 0.bias is \[5\], expected \[32\]"):
        short = vision_arguments(tmp_path, pretrain_mm_mlp_adapter=tmp_path / "short.bin")
        model.get_model().initialize_vision_modules(short)
    (tmp_path / "torn.bin").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"torn.bin' is unreadable"):
        torn = vision_arguments(tmp_path, pretrain_mm_mlp_adapter=tmp_path / "torn.bin")
        model.get_model().initialize_vision_modules(torn)
    model.get_model().initialize_vision_modules(vision_arguments(tmp_path), fsdp=["shard"])
    assert isinstance(model.get_model().vision_tower, list) and model.get_vision_tower().is_loaded
    assert not any("vision_tower" in name for name in model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_around_images(tmp_path, kind):
    model, tokenizer = model_of(kind), Tokenizer()
    old = model.get_input_embeddings().weight.detach().clone()
    rows = torch.randn(2, 32)
    torch.save({"model.embed_tokens.weight": rows}, tmp_path / "rows.bin")
    arguments = {"mm_use_im_patch_token": True, "mm_use_im_start_end": True, "tune_mm_mlp_adapter": True}
    arguments = SimpleNamespace(**arguments, pretrain_mm_mlp_adapter=None)
    model.initialize_vision_tokenizer(arguments, tokenizer)
    table = model.get_input_embeddings().weight
    assert len(tokenizer) == 43 == model.config.vocab_size == table.shape[0]
    torch.testing.assert_close(table[41:], table[:41].mean(0, keepdim=True).expand(2, -1))
    assert torch.equal(table[:40], old) and table.requires_grad
    assert model.get_output_embeddings().weight.requires_grad == (kind == "mpt")  # one table for both
    arguments.pretrain_mm_mlp_adapter, arguments.mm_use_im_patch_token = tmp_path / "rows.bin", False
    again = model_of(kind)
    again.initialize_vision_tokenizer(arguments, Tokenizer())
    assert torch.equal(again.get_input_embeddings().weight[-2:], rows)
    torch.save({"model.embed_tokens.weight": torch.randn(3, 32)}, tmp_path / "rows.bin")
    with pytest.raises(ValueError, match=r"shape \[3, 32\]; expected \[42, 32\], or the two new rows \[2, 32\]"):
        model_of(kind).initialize_vision_tokenizer(arguments, Tokenizer())


def test_siglip_has_no_class_token(tmp_path):
    model = SiglipVisionModel(SiglipVisionConfig(**TOWER_FIELDS))
    model.save_pretrained(tmp_path)
    tower = build_vision_tower(SimpleNamespace(mm_vision_tower=str(tmp_path), mm_vision_select_layer=-1))
    images = torch.rand(2, 3, 16, 16)
    features = tower(images)
    assert features.shape == (2, 4, 24)
    states = model(images, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features, states[-1])
    llava = model_of("llama", mm_vision_config=tower.config.to_dict())
    assert llava(**batch()).logits.shape == (3, 15, 40)
    with pytest.raises(ValueError, match="mm_vision_select_layer is 5; the tower has 3 states"):
        tower.select_layer = 5
        tower(images)


def test_intern_vit_reads_any_size_and_is_chosen_by_its_configuration(tmp_path):
    from internvl_kernels.models.internvl_14b import InternVisionConfig, InternVisionModel

    config = InternVisionConfig(**TOWER_FIELDS, qk_normalization=True)
    InternVisionModel(config).save_pretrained(tmp_path / "eva")  # the name of a folder does not decide
    tower = build_vision_tower(SimpleNamespace(mm_vision_tower=str(tmp_path / "eva")))
    assert type(tower).__name__ == "InternViTTower" and tower(torch.rand(1, 3, 24, 16)).shape == (1, 6, 24)
    with pytest.raises(ValueError, match=r"takes \[n, 3, H, W\] with H and W multiples of 8"):
        tower(torch.rand(1, 3, 20, 16))
    model = model_of("llama", mm_vision_config=tower.config.to_dict(), mm_tune_vision_tower=True)
    model(**batch()).loss.backward()
    assert all(p.grad is not None for p in model.get_vision_tower().vision_tower.embeddings.parameters())
