"""MPT checkpoints of both origins, the conversion between them, attn_impl at run time, and files that do not fit."""

import json

import pytest
import torch
from internvl_kernels.models.mpt import MPTConfig, MPTForCausalLM, from_transformers, to_transformers
from safetensors.torch import load_file, save_file
from transformers import MptConfig, MptForCausalLM

SIZES = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 48, "vocab_size": 50}


def larger(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def hugging_face(**attn):
    return larger(MptForCausalLM(MptConfig(**SIZES, attn_config={"clip_qkv": 3.0, **attn}, layer_norm_epsilon=1e-3)))


def ours(**fields):
    attn = {"alibi": True, "attn_impl": "torch", **fields.pop("attn_config", {})}
    return larger(MPTForCausalLM(MPTConfig(**SIZES, no_bias=True, attn_config=attn, **fields)))


def batch():
    ids = torch.randint(0, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # left padding
    return {"input_ids": ids, "attention_mask": mask}


def same(a, b, data):
    real = data["attention_mask"].bool()
    torch.testing.assert_close(a(**data).logits[real], b(**data).logits[real], atol=2e-5, rtol=1e-4)


def test_conversion_both_ways_keeps_the_logits_and_shares_the_weights():
    theirs, data = hugging_face(), batch()
    mine = from_transformers(theirs)
    same(mine, theirs, data)
    assert mine.transformer.wte.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    back = to_transformers(mine)
    assert torch.equal(back(**data).logits, theirs(**data).logits)
    assert back.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    original = ours(attn_config={"clip_qkv": 3.0, "softmax_scale": 0.4})
    same(original, to_transformers(original), data)
    greedy = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    assert torch.equal(mine.generate(**data, **greedy), theirs.generate(**data, use_cache=True, **greedy))


def test_both_kinds_of_checkpoint_load(tmp_path):
    theirs, mine, data = hugging_face(), ours(), batch()
    theirs.save_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "mine")
    loaded = MPTForCausalLM.from_pretrained(tmp_path / "theirs")
    assert loaded.config.no_bias and loaded.config.attn_config["alibi"] and loaded.config.layer_norm_epsilon == 1e-3
    same(loaded, theirs, data)
    same(MPTForCausalLM.from_pretrained(tmp_path / "mine"), mine, data)
    to_transformers(loaded).save_pretrained(tmp_path / "again")
    same(MptForCausalLM.from_pretrained(tmp_path / "again"), theirs, data)
    loaded.save_pretrained(tmp_path / "changed")
    same(MPTForCausalLM.from_pretrained(tmp_path / "changed"), theirs, data)
    # original files repeat the table as the head
    weights = load_file(tmp_path / "mine" / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, tmp_path / "mine" / "model.safetensors", {"format": "pt"})
    same(MPTForCausalLM.from_pretrained(tmp_path / "mine"), mine, data)
    mine.load_state_dict(weights)
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head.weight differs from transformer.wte.weight"):
        mine.load_state_dict(weights)


def test_what_transformers_cannot_express_is_named():
    model = ours(attn_config={"qk_ln": True, "prefix_lm": True}, logit_scale=0.5)
    with pytest.raises(ValueError, match=r"logit_scale is 0.5, expected None; attn_config\['qk_ln'\] is True"):
        to_transformers(model)


@pytest.mark.parametrize("name", ["flash", "triton"])
def test_attention_changes_at_run_time(name):
    model, data = ours(attn_config={"qk_ln": True, "clip_qkv": 2.0}), batch()
    wanted = model(**data).logits
    cached = model.generate(**data, max_new_tokens=4, pad_token_id=0)
    model.set_attn_impl(name)
    real = data["attention_mask"].bool()
    torch.testing.assert_close(model(**data).logits[real], wanted[real], atol=2e-5, rtol=1e-4)
    assert torch.equal(model.generate(**data, max_new_tokens=4, pad_token_id=0), cached)
    model.set_attn_impl("torch")
    assert torch.equal(model(**data).logits, wanted)
    with pytest.raises(ValueError, match="attn_impl is 'sdpa'"):
        model.set_attn_impl("sdpa")


def broken(weights, kind):
    key = "transformer.blocks.1.attn.Wqkv.weight"
    if kind == "missing":
        del weights[key]
    elif kind == "extra":
        weights["transformer.blocks.2.attn.Wqkv.weight"] = weights[key].clone()
    else:
        weights[key] = weights[key][:64].clone()
    return weights


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("missing", r"1 missing \(transformer.blocks.1.attn.Wqkv.weight\)"),
        ("extra", r"1 not part of the model \(transformer.blocks.2.attn.Wqkv.weight\)"),
        ("misshapen", r"misshapen \(transformer.blocks.1.attn.Wqkv.weight.*, expected \[96, 32\]\)"),
        ("cut", "has an unreadable file"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, kind, sentence):
    ours().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        save_file(broken(load_file(file), kind), file, {"format": "pt"})
    with pytest.raises(ValueError, match=sentence):
        MPTForCausalLM.from_pretrained(tmp_path)


def test_an_original_configuration_is_read_as_its_own_class_means_it(tmp_path):
    fields = {**SIZES, "architectures": ["MPTForCausalLM"], "model_type": "mpt", "loss_fn": "fused_crossentropy"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = MPTConfig.from_pretrained(tmp_path)
    assert not config.no_bias and not config.attn_config["alibi"] and config.attn_config["attn_impl"] == "triton"
