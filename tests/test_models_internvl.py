"""InternViT and the InternVL-14B wrapper against recorded cases and the same arithmetic written out."""

from pathlib import Path

import pytest
import torch
from internvl_kernels.models.internvl_14b import InternVisionConfig, InternVisionModel, InternVLConfig, InternVLModel

from tests.golden import case_ids, replay

BANK = Path(__file__).parent / "golden_bank"
VISION = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "patch_size": 4,
    "image_size": 16,
}
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


def tiny_vision(**changes):
    torch.manual_seed(7)
    return InternVisionModel(InternVisionConfig(**{**VISION, "initializer_range": 0.2, **changes})).eval()


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


def test_vision_tower_runs_at_other_sizes_after_resizing():
    """The interpolated table of a size and the resized parameter give the same states there."""
    model, images = tiny_vision(), torch.rand(2, 3, 24, 24)
    before = model(images).last_hidden_state
    model.resize_pos_embeddings(16, 24, 4)
    assert model.config.image_size == 24
    torch.testing.assert_close(model(images).last_hidden_state, before)
    with pytest.raises(ValueError, match="this model has image_size=24 and patch_size=4"):
        model.resize_pos_embeddings(16, 24, 4)


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


def test_files_are_read_back(tmp_path):
    model, images = tiny(), torch.rand(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    again = InternVLModel.from_pretrained(tmp_path).eval()
    assert again.config.qllama_config.num_query_token == 6 and again.config.hidden_size == 32
    assert torch.equal(model(images)[1], again(images)[1])
    assert InternVisionConfig.from_pretrained(tmp_path).hidden_size == 24
