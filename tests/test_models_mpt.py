"""MPT models: recorded cases, caches, generation, files, checkpointing, configuration, refusals."""

import json
from pathlib import Path

import pytest
import torch
from internvl_kernels.models.mpt import ATTN_CLASS_REGISTRY, MPTConfig, MPTForCausalLM, MPTModel
from transformers import DynamicCache, StaticCache

from tests.golden import case_ids, main, replay

BANK = Path(__file__).parent / "golden_bank"
IMPLS = ("torch", "flash", "triton")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_model(cls=MPTForCausalLM, attn_type="multihead_attention", **attn):
    config = MPTConfig(
        d_model=24,
        n_heads=6,
        n_layers=2,
        expansion_ratio=2,
        max_seq_len=32,
        vocab_size=50,
        attn_config={"attn_type": attn_type, "qk_ln": True, "clip_qkv": 2.0, **attn},
        init_config={"name": "baseline_", "init_std": 0.3, "init_div_is_residual": False},
    )
    return cls(config).eval()


class EmbeddingLM(MPTForCausalLM):
    """The seam a vision-language model uses."""

    accepts_inputs_embeds = True


@pytest.mark.parametrize("case_id", [case_id for case_id in case_ids(BANK) if case_id.startswith("mpt_")])
def test_golden(case_id):
    outcomes = list(replay(BANK, case_id))
    assert outcomes
    problems = [f"[{impl}] {outcome.call}: {outcome.problems}" for impl, outcome in outcomes if outcome.problems]
    assert not problems, "\n".join(problems)


def test_golden_replay_counts_and_fails(tmp_path, capsys):
    """The last line has its form, and a wrong record makes the exit code 1."""
    name = "mpt_fn_alibi"
    case = json.loads((BANK / f"{name}.json").read_text())
    wrong = next(call for call in case["calls"] if call["method"] == "attn_bias_shape" and not call.get("raises"))
    wrong["outputs"]["ret"] = {"$tuple": [1, 2, 3, 4]}
    (tmp_path / f"{name}.json").write_text(json.dumps(case))
    (tmp_path / f"{name}.safetensors").write_bytes((BANK / f"{name}.safetensors").read_bytes())
    (tmp_path / "index.json").write_text(json.dumps([{"id": name}, {"id": "other_system"}]))
    assert main(["--bank", str(tmp_path)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"golden: {len(case['calls'])} calls compared, 1 mismatches, 0 stated deviations"
    assert any("not in this version (1 cases): other_system" in line for line in printed)


CACHES = {
    "list": lambda config: [()] * config.n_layers,
    "tuple": lambda config: ((),) * config.n_layers,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=20),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("attn_type", ATTN_CLASS_REGISTRY)
@pytest.mark.parametrize("alibi", [False, True])
def test_cached_decoding_equals_one_pass(impl, kind, attn_type, alibi):
    model = tiny_model(attn_type=attn_type, alibi=alibi, prefix_lm=True, attn_uses_sequence_id=True)
    model.set_attn_impl(impl)
    ids = torch.randint(0, 50, (2, 12))
    masks = {
        "prefix_mask": torch.zeros(2, 12, dtype=torch.bool).index_fill(1, torch.arange(6), True),
        "attention_mask": torch.ones(2, 12, dtype=torch.bool).index_fill(1, torch.tensor([3]), False),
        "sequence_id": torch.tensor([[0] * 12, [0] * 2 + [1] * 10]),
    }
    masks["attention_mask"][1, 0] = False
    with torch.no_grad():
        whole = model(ids, **masks).logits
        past, parts = CACHES[kind](model.config), []
        for begin, end in ((0, 6), (6, 7), (7, 10), (10, 12)):
            given = {name: mask[:, :end] for name, mask in masks.items()}
            before = None if kind in ("dynamic", "static") else tuple(past)
            step = model(ids[:, begin:end], past_key_values=past, use_cache=True, **given)
            assert before is None or tuple(past) == before  # the caller's sequence is not changed
            past = step.past_key_values
            parts.append(step.logits)
    rows = masks["attention_mask"]
    torch.testing.assert_close(torch.cat(parts, 1)[rows], whole[rows], atol=2e-5, rtol=1e-4)


def greedy(model, ids, mask, prefix, steps):
    """Greedy tokens by encoding everything anew at each step."""
    prompt = ids.shape[1]
    for _ in range(steps):
        ones = torch.ones(ids.shape[0], ids.shape[1] - prompt, dtype=torch.bool)
        given = {"attention_mask": torch.cat([mask, ones], 1)}
        if prefix is not None:
            given["prefix_mask"] = torch.cat([prefix, ~ones], 1)
        ids = torch.cat([ids, model(ids, **given).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("prefix_lm", [False, True])
def test_generate(impl, alibi, prefix_lm):
    model = tiny_model(alibi=alibi, prefix_lm=prefix_lm)
    model.set_attn_impl(impl)
    ids = torch.randint(0, 50, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        want = greedy(model, ids, mask, torch.ones_like(mask) if prefix_lm else None, 6)
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), want)
        assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **options), want)
        static = model.generate(
            ids, attention_mask=mask, past_key_values=StaticCache(config=model.config, max_cache_len=16), **options
        )
        assert torch.equal(static, want)
        if prefix_lm:
            opened = torch.zeros_like(mask).index_fill(1, torch.tensor([4, 5]), True)
            want = greedy(model, ids, mask, opened, 6)
            got = model.generate(ids, attention_mask=mask, prefix_mask=opened, **options)
            assert torch.equal(got, want)


def test_generate_beams_and_samples_agree_between_implementations():
    model = tiny_model(attn_type="multiquery_attention", alibi=True, prefix_lm=True)
    ids = torch.randint(0, 50, (2, 5))
    results = {}
    for impl in IMPLS:
        model.set_attn_impl(impl)
        beams = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
        torch.manual_seed(1)
        samples = model.generate(ids, max_new_tokens=6, do_sample=True, top_k=5, pad_token_id=0)
        results[impl] = (beams, samples)
        one = model.generate(ids[:1], max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
        assert torch.equal(one, beams[:1])  # rows do not mix when beams are re-ordered
    for impl in ("flash", "triton"):
        assert torch.equal(results[impl][0], results["torch"][0])
        assert torch.equal(results[impl][1], results["torch"][1])


def test_generate_continues_the_last_segment():
    model = tiny_model(alibi=True, attn_uses_sequence_id=True)
    ids = torch.randint(0, 50, (1, 8))
    packed = model.generate(
        ids, sequence_id=torch.tensor([[0] * 3 + [1] * 5]), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    alone = model.generate(ids[:, 3:], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(packed[:, 8:], alone[:, 5:])


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_generate_from_embeddings(options):
    model = tiny_model(EmbeddingLM, alibi=True, prefix_lm=True)
    ids = torch.randint(0, 50, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :2] = False
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask, **options}
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), model.generate(ids, **options)[:, 7:])
    with pytest.raises(ValueError, match="pass one of them"):
        model.generate(ids, inputs_embeds=embeds, **options)


def test_long_input_without_a_dense_bias():
    model = tiny_model(alibi=True)
    ids = torch.randint(0, 50, (1, 40))  # max_seq_len is 32
    assert model(ids).logits.shape == (1, 40, 50)
    model.set_attn_impl("torch")
    with pytest.raises(AssertionError, match="max_seq_len"):
        model(ids)
    with pytest.raises(RuntimeError, match="max_seq_len"):
        past = model(ids[:, :32], use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=past)


def test_save_and_load(tmp_path):
    model = tiny_model(alibi=True, prefix_lm=True, attn_type="multiquery_attention")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = MPTForCausalLM.from_pretrained(tmp_path).eval()
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert not any("lm_head" in name or "bias_cache" in name for name in loaded.state_dict())
    assert loaded.config.attn_config == model.config.attn_config
    ids = torch.randint(0, 50, (2, 6))
    mask = torch.ones_like(ids)
    assert torch.equal(loaded(ids, prefix_mask=mask).logits, model(ids, prefix_mask=mask).logits)


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = torch.randint(0, 50, (2, 9))
    given = {"prefix_mask": torch.ones(2, 9).tril(4), "labels": ids}
    for impl in IMPLS:
        model = tiny_model(alibi=True, prefix_lm=True).train()
        model.set_attn_impl(impl)
        model(ids, **given).loss.backward()
        want = {name: p.grad.clone() for name, p in model.named_parameters()}
        for reentrant in (False, True):
            model.zero_grad(set_to_none=True)
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            output = model(ids, use_cache=True, **given)
            assert output.past_key_values is None
            output.loss.backward()
            for name, p in model.named_parameters():
                torch.testing.assert_close(p.grad, want[name], atol=1e-6, rtol=1e-5)
        model.gradient_checkpointing_disable()
        assert model(ids, use_cache=True, **given).past_key_values is not None


def test_configurations_share_nothing():
    attn = {"alibi": True}
    first, second = MPTConfig(attn_config=attn), MPTConfig()
    first.attn_config["qk_ln"] = True
    first.init_config["name"] = "small_init_"
    assert attn == {"alibi": True}
    assert second.attn_config["qk_ln"] is False and second.attn_config["alibi"] is False
    assert MPTConfig().init_config["name"] == "kaiming_normal_"
    assert second.attn_config["attn_impl"] == "triton" and second.use_cache is False
    again = MPTConfig.from_dict(first.to_dict())
    assert again.attn_config == first.attn_config and again.d_model == first.hidden_size == 2048


def test_initialisation():
    config = MPTConfig(d_model=64, n_heads=4, n_layers=8, vocab_size=40, attn_config={"alibi": True})
    model = MPTModel(config)
    block = model.blocks[0]
    wanted = (2 / 64) ** 0.5  # kaiming, fan in, relu; the same for each third of the fused projection
    for part in block.attn.Wqkv.weight.chunk(3):
        assert abs(part.std() / wanted - 1) < 0.1
    assert abs(block.attn.out_proj.weight.std() / (wanted / 4) - 1) < 0.1  # residual: divided by sqrt(2 * 8)
    assert abs(block.ffn.down_proj.weight.std() / (wanted / 2 / 4) - 1) < 0.1
    assert not block.ffn.up_proj.bias.any() and bool((block.norm_1.weight == 1).all())
    config.init_config.update(emb_init_std=0.5, init_div_is_residual=False)
    model = MPTModel(config)
    assert abs(model.wte.weight.std() - 0.5) < 0.05
    assert abs(model.blocks[0].attn.out_proj.weight.std() / wanted - 1) < 0.1
    for name, message in (("nothing", "allowed"), ("baseline_", "init_std")):
        config.init_config["name"] = name
        with pytest.raises(ValueError, match=message):
            MPTModel(config)


def test_attentions_of_the_eager_path():
    model = tiny_model(alibi=True)
    ids = torch.randint(0, 50, (2, 5))
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(ids, output_attentions=True)
    model.set_attn_impl("torch")
    attentions = model(ids, output_attentions=True).attentions
    assert len(attentions) == 2 and attentions[0].shape == (2, 6, 5, 5)
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 6, 5))


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_input_is_named(impl):
    ids = torch.randint(0, 50, (2, 6))
    causal, prefix = tiny_model(alibi=True), tiny_model(alibi=True, prefix_lm=True, attn_uses_sequence_id=True)
    wpe = tiny_model()
    for model in (causal, prefix, wpe):
        model.set_attn_impl(impl)
    mask = torch.ones_like(ids)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 5\]; expected .* = \[2, 6\]"):
        causal(ids, attention_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="prefix_mask was given"):
        causal(ids, prefix_mask=mask)
    with pytest.raises(ValueError, match="prefix_mask is None"):
        prefix(ids)
    with pytest.raises(ValueError, match=r"prefix_mask has shape \[1, 6\]"):
        prefix(ids, prefix_mask=mask[:1])
    with pytest.raises(ValueError, match=r"sequence_id has shape \[2, 7\]"):
        prefix(ids, prefix_mask=mask, sequence_id=torch.zeros(2, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="past_key_values holds 1 layers; this model has 2"):
        causal(ids, past_key_values=[()])
    with pytest.raises(ValueError, match="caches"):
        wrong = torch.zeros(2, 4, 24) if impl == "torch" else torch.zeros(2, 6, 4, 4)
        causal(ids, past_key_values=[(wrong, wrong)] * 2)
    with pytest.raises(NotImplementedError, match="left"):
        causal.train()(ids, attention_mask=mask.index_fill(1, torch.tensor([0]), 0))
    with pytest.raises(NotImplementedError, match="right"):
        causal.generate(ids, attention_mask=mask.index_fill(1, torch.tensor([5]), 0), max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="inputs_embeds"):
        causal(inputs_embeds=torch.randn(2, 6, 24))
    with pytest.raises(AssertionError, match="ALiBi"):
        wpe.transformer(inputs_embeds=torch.randn(2, 6, 24))
    with pytest.warns(UserWarning, match="sequence_id was given and is ignored"):
        causal(ids, sequence_id=mask)
