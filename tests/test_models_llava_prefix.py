"""The prefix-LM LLaVA: who sees whom, generation over a cache against re-encoding, checkpoints, gradients."""

import copy

import pytest
import torch
from internvl_kernels.models.llava import IGNORE_INDEX, LlavaMptPrefixConfig, LlavaMptPrefixForCausalLM
from internvl_kernels.models.llava import IMAGE_TOKEN_INDEX as IMG
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

PATCHES = 4
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 8,
}


def model_of(prefix=True, seed=0, **fields):
    torch.manual_seed(seed)
    config = LlavaMptPrefixConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=40,
        attn_config={"prefix_lm": prefix, "qk_ln": True, "clip_qkv": 6.0},
        mm_projector_type="mlp2x_gelu",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **{"mm_vision_config": TOWER, **fields},
    )
    model = LlavaMptPrefixForCausalLM(config).eval()
    with torch.no_grad():  # larger weights than at the start of training, so that differences show
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * 0.1)
            if name.endswith("wte.weight"):  # the output head is tied to it: a large one repeats the last token
                p.mul_(0.1)
    return model


def batch():
    """Two prompts with answers: one image and padding on the right; two images."""
    torch.manual_seed(1)
    ids = torch.tensor([[1, 5, IMG, 6, 7, 8, 9, 0, 0], [1, IMG, 5, 6, IMG, 7, 8, 9, 10]])
    labels = torch.tensor([[*[IGNORE_INDEX] * 5, 8, 9, *[IGNORE_INDEX] * 2], [*[IGNORE_INDEX] * 6, 8, 9, 10]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels, "images": torch.rand(3, 3, 16, 16)}


def states(model, **inputs):
    return model(output_hidden_states=True, **inputs).hidden_states[-1]


@pytest.mark.parametrize("prefix", [True, False])
def test_image_sees_the_question_after_it_only_with_the_prefix(prefix):
    model, data = model_of(prefix), batch()
    before = states(model, **data)
    data["input_ids"][0, 4] = 30  # the question's last token; the image stands at 2 to 5 of the fused row
    after = states(model, **data)
    image = slice(2, 2 + PATCHES)
    assert torch.equal(before[1], after[1])
    assert (not torch.allclose(before[0, image], after[0, image], atol=1e-4)) == prefix
    assert not torch.allclose(before[0, 7], after[0, 7], atol=1e-4)


def test_answer_is_causal():
    model, data = model_of(), batch()
    before = states(model, **data)
    data["input_ids"][0, 6] = 30  # last answer token, fused position 9
    after = states(model, **data)
    torch.testing.assert_close(before[0, :9], after[0, :9], atol=1e-6, rtol=0)
    assert not torch.allclose(before[0, 9], after[0, 9], atol=1e-4)


def test_prefix_mask_of_the_caller_is_fused_like_the_tokens():
    model, data = model_of(), batch()
    data["labels"] = None
    prompt = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0]])
    given = states(model, prefix_mask=prompt, **data)
    derived = states(model, **{**data, "labels": batch()["labels"]})
    real = torch.tensor([10, 15])  # 7 - 1 + 4 and 9 - 2 + 8 fused tokens
    for b in range(2):
        torch.testing.assert_close(given[b, : real[b]], derived[b, : real[b]])
    everything = states(model, **data)  # without labels all real tokens are the prompt
    assert not torch.allclose(everything[1], derived[1], atol=1e-4)


def test_loss_is_that_of_each_row_alone_and_on_either_side_padded():
    model, data = model_of(), batch()
    together = model(**data)
    rows = [
        model(input_ids=data["input_ids"][:1, :7], labels=data["labels"][:1, :7], images=data["images"][:1]),
        model(input_ids=data["input_ids"][1:], labels=data["labels"][1:], images=data["images"][1:]),
    ]
    torch.testing.assert_close(together.logits[0, :10], rows[0].logits[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.logits[1], rows[1].logits[0], atol=1e-5, rtol=1e-4)
    wanted = (2 * rows[0].loss + 3 * rows[1].loss) / 5  # mean over 2 + 3 answer tokens
    torch.testing.assert_close(together.loss, wanted)
    left = {name: data[name].clone() for name in ("input_ids", "attention_mask", "labels")}
    for value in left.values():
        value[0] = value[0].roll(2)
    for training in (False, True):  # no dropout here: training only changes how rows are packed
        model.train(training)
        torch.testing.assert_close(model(**left, images=data["images"]).loss, wanted)


def greedy_by_encoding_everything(model, row, images, steps):
    """The model's own next tokens without a cache: prompt bidirectional, the rest causal."""
    row, new = row.clone(), []
    prompt = row.shape[1]
    for _ in range(steps):
        mask = torch.arange(row.shape[1])[None] < prompt
        prefix = {} if model.config.mm_prefix is None else {"prefix_mask": mask}
        logits = model(input_ids=row, images=images, attention_mask=torch.ones_like(row), **prefix).logits
        new.append(int(logits[0, -1].argmax()))
        row = torch.cat([row, torch.tensor([new[-1:]])], 1)
    return new


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_equals_encoding_everything_each_step(prefix, side):
    model, data = model_of(prefix), batch()
    rows = [data["input_ids"][:1, :5], data["input_ids"][1:, :6]]
    images = [data["images"][:1], data["images"][1:]]
    wanted = [greedy_by_encoding_everything(model, *pair, 6) for pair in zip(rows, images, strict=True)]
    assert len(set(wanted[0]) | set(wanted[1])) > 3, "too easy: the model repeats itself"
    short = torch.cat([torch.zeros_like(rows[0][:, :1]), rows[0]], 1) if side == "left" else data["input_ids"][:1, :6]
    ids = torch.cat([short, rows[1]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1] if side == "left" else [1, 1, 1, 1, 1, 0], [1] * 6])
    ids = ids.masked_fill(mask == 0, 0)
    got = model.generate(ids, images=data["images"], attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(got[:, :6], ids)
    assert got[:, 6:].tolist() == wanted
    for b in range(2):
        alone = model.generate(input_ids=rows[b], images=images[b], max_new_tokens=6, do_sample=False)
        assert alone[0, rows[b].shape[1] :].tolist() == wanted[b]


@pytest.mark.parametrize("prefix", [True, False])
def test_several_tokens_on_top_of_a_cache_are_causal(prefix):
    model, data = model_of(prefix), batch()
    row, images = data["input_ids"][1:], data["images"][1:]
    full = model(input_ids=row, images=images, labels=data["labels"][1:]).logits
    start = model(input_ids=row[:, :6], images=images, use_cache=True)
    more = model(input_ids=row[:, 6:], images=images, past_key_values=start.past_key_values)
    torch.testing.assert_close(torch.cat([start.logits, more.logits], 1), full, atol=1e-5, rtol=1e-4)


def test_generate_with_beams_samples_and_scores():
    model, data = model_of(), batch()
    asked = {"inputs": data["input_ids"][1:, :6], "images": data["images"][1:], "max_new_tokens": 4}
    beams = model.generate(**asked, num_beams=3, num_return_sequences=3, do_sample=False)
    assert beams.shape == (3, 10) and torch.equal(beams[:, :6], asked["inputs"].expand(3, -1))
    torch.manual_seed(0)
    samples = model.generate(**asked, do_sample=True, top_k=10, num_return_sequences=4)
    assert len({tuple(row) for row in samples.tolist()}) > 1
    out = model.generate(**asked, do_sample=False, return_dict_in_generate=True, output_scores=True)
    first = model(input_ids=asked["inputs"], images=asked["images"]).logits[:, -1]
    torch.testing.assert_close(out.scores[0], first, atol=1e-5, rtol=1e-4)
    assert out.sequences.shape == (1, 10)


def beam_score(model, row, images, answer):
    """Sum of the log-probabilities of ``answer`` after the prompt."""
    full = torch.cat([row, answer[None]], 1)
    mask = torch.arange(full.shape[1])[None] < row.shape[1]
    logits = model(input_ids=full, images=images, prefix_mask=mask).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1).gather(1, answer[:, None]).sum()


def test_beams_reorder_the_cache():
    model, data = model_of(), batch()
    row, images = data["input_ids"][1:, :6], data["images"][1:]
    out = model.generate(
        row, images=images, max_new_tokens=4, num_beams=4, do_sample=False, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    wanted = beam_score(model, row, images, out.sequences[0, 6:])
    torch.testing.assert_close(out.sequences_scores[0], wanted, atol=1e-4, rtol=1e-4)


def test_text_alone_needs_no_images():
    model = model_of()
    ids = torch.tensor([[1, 5, 6, 7]])
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 6, 7]])
    assert torch.isfinite(model(input_ids=ids, labels=labels).loss)
    got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert got[0, 4:].tolist() == greedy_by_encoding_everything(model, ids, None, 3)


def test_wrong_number_of_images_names_the_sample():
    model, data = model_of(), batch()
    with pytest.raises(ValueError, match=r"2 given, expected 3.*sample 1 has 2 placeholders and finds 1"):
        model(**{**data, "images": data["images"][:2]})
    with pytest.raises(ValueError, match="1 given, expected 3"):
        model.generate(data["input_ids"], images=data["images"][:1], max_new_tokens=2)


@pytest.mark.parametrize("tuned", [False, True])
def test_gradients_reach_the_projector_and_a_tuned_tower(tuned):
    model = model_of(mm_tune_vision_tower=tuned).train()
    model(**batch()).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert grads["transformer.mm_projector.0.weight"].abs().sum() > 0
    assert grads["transformer.wte.weight"].abs().sum() > 0
    patches = next(g for name, g in grads.items() if name.endswith("patch_embedding.weight"))
    assert (patches is not None and bool(patches.abs().sum() > 0)) == tuned


def test_gradient_of_the_projector_equals_a_finite_difference(monkeypatch):
    monkeypatch.setenv("INTERNVL_BACKEND", "reference")  # the one that runs in double precision
    model, data = model_of().double(), batch()
    data["images"] = data["images"].double()
    bias = model.transformer.mm_projector[2].bias
    model(**data).loss.backward()
    step = torch.zeros_like(bias)
    step[3] = 1e-5
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            bias.add_(sign * step)
            losses.append(model(**data).loss)
            bias.sub_(sign * step)
    torch.testing.assert_close(bias.grad[3], (losses[0] - losses[1]) / 2e-5, atol=1e-7, rtol=1e-4)


def test_checkpoint_keys_and_reload(tmp_path):
    model, data = model_of(), batch()
    keys = set(model.state_dict())
    assert {
        "transformer.wte.weight",
        "transformer.mm_projector.0.weight",
        "transformer.blocks.0.attn.Wqkv.weight",
    } <= keys
    tower = {k for k in keys if k.startswith("transformer.vision_tower.vision_tower.")}
    assert any(k.endswith("patch_embedding.weight") for k in tower)
    assert all(k.startswith("transformer.") for k in keys)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llava_mpt_prefix"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LlavaMptPrefixForCausalLM and not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again(**data).logits, model(**data).logits)
    frozen = {name for name, p in again.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad} == tower


def test_tower_from_a_folder_travels_with_the_checkpoint(tmp_path):
    torch.manual_seed(3)
    CLIPVisionModel(CLIPVisionConfig(**TOWER)).save_pretrained(tmp_path / "clip")
    model = model_of(mm_vision_config=None, mm_vision_tower=str(tmp_path / "clip"))
    assert not any("vision_tower" in name for name in model.state_dict())
    model.get_vision_tower().load_model()
    model.save_pretrained(tmp_path / "llava")
    (tmp_path / "clip").rename(tmp_path / "gone")
    again = LlavaMptPrefixForCausalLM.from_pretrained(tmp_path / "llava")
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


def test_copies_are_independent():
    model, data = model_of(), batch()
    other = copy.deepcopy(model)
    before = model(**data).logits
    with torch.no_grad():
        other.transformer.wte.weight.zero_()
    assert torch.equal(model(**data).logits, before)


def test_width_of_the_tower_is_checked():
    with pytest.raises(ValueError, match="mm_hidden_size is 99; the vision tower's width is 24"):
        model_of(mm_hidden_size=99)
