"""Projectors, vision towers, and the fusing of text and images against sequences written out by hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from internvl_kernels.models.llava import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    LlavaMetaForCausalLM,
    build_vision_projector,
    build_vision_tower,
)
from safetensors.torch import load_file
from torch import nn

from tests.golden import replay
from tests.golden_reader import case_ids
from tests.golden_registry import runner_for

IMG, IGN = IMAGE_TOKEN_INDEX, IGNORE_INDEX
BANK = Path(__file__).parent / "golden_bank"
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 8,
}


def projector_calls():
    return json.loads((BANK / "projector.json").read_text())["calls"]


GOLDEN = [(name, impl) for name in case_ids(BANK) if name.startswith("llava_") for impl in runner_for(name).impls]


@pytest.mark.parametrize(("case_id", "impl"), GOLDEN)
def test_golden(case_id, impl):
    for _, outcome in replay(BANK, case_id, (impl,)):
        assert not outcome.problems, f"{outcome.call}: {'; '.join(outcome.problems)}"


@pytest.mark.parametrize("call", projector_calls(), ids=lambda call: call["name"])
def test_projector_equals_recorded_cases(call):
    tensors = load_file(BANK / "projector.safetensors")
    if call["method"] == "build_vision_projector" and "raises" in call:
        with pytest.raises(ValueError, match="mm_projector_type is"):
            build_vision_projector(SimpleNamespace(**call["config"]))
        return
    projector = build_vision_projector(SimpleNamespace(**call["config"]))
    if "raises" in call:  # two_mlp with other lengths than the one it serves
        with pytest.raises(AssertionError, match="96 query states and 4 patches; expected 96 and 576"):
            projector((torch.zeros(1, 4, 3200), torch.zeros(1, 96, call["config"]["mm_hidden_size"])))
        return
    assert {k: list(v.shape) for k, v in projector.state_dict().items()} == call["state_dict_keys"]
    if call["outputs"]:
        mine = f"w/{call['name']}."
        projector.load_state_dict({k[len(mine) :]: v for k, v in tensors.items() if k.startswith(mine)})
        got = projector(tensors[call["kwargs"]["x"]["$t"]])
        torch.testing.assert_close(got, tensors[call["outputs"]["ret"]["$t"]], atol=1e-5, rtol=1e-4)


def test_projector_without_a_type_is_linear():
    assert isinstance(build_vision_projector(SimpleNamespace(mm_hidden_size=3, hidden_size=2)), nn.Linear)
    with pytest.raises(ValueError, match="mlp0x_gelu"):
        build_vision_projector(SimpleNamespace(mm_hidden_size=3, hidden_size=2, mm_projector_type="mlp0x_gelu"))


def tower_of(**fields):
    torch.manual_seed(0)
    return build_vision_tower(SimpleNamespace(mm_vision_config=TOWER, **fields))


@pytest.mark.parametrize("layer", [-2, -1, 0])
def test_tower_selects_the_hidden_state_and_drops_the_class_token(layer):
    images = torch.rand(2, 3, 16, 16)
    tower = tower_of(mm_vision_select_layer=layer)
    wanted = tower.vision_tower(images, output_hidden_states=True).hidden_states[layer]
    assert wanted.shape == (2, 5, 24)
    torch.testing.assert_close(tower(images), wanted[:, 1:])
    torch.testing.assert_close(
        tower_of(mm_vision_select_layer=layer, mm_vision_select_feature="cls_patch")(images), wanted
    )
    assert (tower.num_patches, tower.hidden_size, tower.dummy_feature.shape) == (4, 24, (1, 24))


def test_tower_is_frozen_unless_asked_and_keeps_the_images_dtype():
    images = torch.rand(2, 3, 16, 16)
    frozen, tuned = tower_of(), tower_of(mm_tune_vision_tower=True)
    assert not frozen(images).requires_grad and not any(p.requires_grad for p in frozen.parameters())
    assert tuned(images).requires_grad and all(p.requires_grad for p in tuned.parameters())
    assert frozen(images.half()).dtype == torch.float16
    torch.testing.assert_close(torch.cat(frozen(list(images))), frozen(images), atol=1e-6, rtol=1e-5)


def test_tower_from_a_folder_waits_for_load_model(tmp_path):
    tower_of().vision_tower.save_pretrained(tmp_path)
    tower = build_vision_tower(SimpleNamespace(mm_vision_tower=str(tmp_path)), delay_load=True)
    assert not tower.is_loaded and tower.hidden_size == 24 and tower.num_patches == 4
    with pytest.raises(RuntimeError, match="call load_model"):
        tower(torch.rand(1, 3, 16, 16))
    tower.load_model()
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(tower(images), tower_of()(images))


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        ({"mm_vision_tower": "resnet"}, ValueError, "mm_vision_tower is 'resnet'; allowed: a folder"),
        ({"mm_vision_tower": None}, ValueError, "mm_vision_tower is None"),
        ({"mm_vision_tower": "openai/eva-clip"}, NotImplementedError, "builds CLIP, SigLIP, InternViT-6B"),
        ({"mm_vision_config": {"model_type": "vit"}}, NotImplementedError, "'vit'; this version builds 'clip'"),
        ({"mm_vision_config": TOWER, "mm_vision_select_feature": "cls"}, ValueError, "is 'cls'; allowed: 'patch'"),
    ],
)
def test_tower_refusals_say_what_is_allowed(fields, error, sentence):
    with pytest.raises(error, match=sentence):
        build_vision_tower(SimpleNamespace(**fields))


class Fuser(LlavaMetaForCausalLM):
    """The mixin on a bare embedding table; an 'image' of side 1 and c channels is c features, all distinct."""

    def __init__(self, rows_per_image=2, **config):
        torch.manual_seed(0)
        self.table, self.rows = nn.Embedding(50, 4), rows_per_image
        self.weight = torch.ones(4, requires_grad=True)  # stands for the projector
        self.config = SimpleNamespace(**config)

    def get_model(self):
        return self

    def get_vision_tower(self):
        return self

    def get_input_embeddings(self):
        return self.table

    def encode_images(self, images):
        return (images.flatten(1)[:, : self.rows, None] + torch.arange(4) / 10) * self.weight


def images_of(count, rows=2):
    """Image i has features 100 * (i + 1) + row."""
    return (100.0 * torch.arange(1, count + 1)[:, None] + torch.arange(3)[None, :]).view(count, 3, 1, 1)


def written_out(fuser, sequences, length):
    """[B, length, 4] from lists of token ids (ints), features ('i.r': image i, row r) and padding (None)."""
    out = torch.zeros(len(sequences), length, 4)
    for b, sequence in enumerate(sequences):
        assert len(sequence) == length
        for at, item in enumerate(sequence):
            if isinstance(item, str):
                image, row = item.split(".")
                out[b, at] = 100.0 * (int(image) + 1) + int(row) + torch.arange(4) / 10
            elif item is not None:
                out[b, at] = fuser.table.weight[item]
    return out


CASES = {
    # name: ids, mask, labels, images; fused sequences, mask, labels
    "image in the middle": (
        [[1, IMG, 7, 8]], [[1, 1, 1, 1]], [[IGN, 5, 7, 8]], 1,
        [[1, "0.0", "0.1", 7, 8]], [[1, 1, 1, 1, 1]], [[IGN, IGN, IGN, 7, 8]],
    ),
    "leading, consecutive and trailing": (
        [[IMG, IMG, 3, IMG]], [[1, 1, 1, 1]], [[9, 9, 3, 9]], 3,
        [["0.0", "0.1", "1.0", "1.1", 3, "2.0", "2.1"]], [[1] * 7], [[IGN] * 4 + [3, IGN, IGN]],
    ),
    "ragged, padded on the right": (
        [[1, IMG, 3, IMG], [1, 2, IMG, 0], [5, IMG, 0, 0]], [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]],
        [[1, 1, 3, 1], [IGN, 2, 1, IGN], [5, 1, IGN, IGN]], 4,
        [[1, "0.0", "0.1", 3, "1.0", "1.1"], [1, 2, "2.0", "2.1", 0, None], [5, "3.0", "3.1", 0, 0, None]],
        [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]],
        [[1, IGN, IGN, 3, IGN, IGN], [IGN, 2, IGN, IGN, IGN, IGN], [5, IGN, IGN, IGN, IGN, IGN]],
    ),
    "padded on the left": (
        [[0, 0, IMG, 4], [1, IMG, 4, 5]], [[0, 0, 1, 1], [1, 1, 1, 1]], [[IGN, IGN, 2, 4], [1, 2, 4, 5]], 2,
        [[0, 0, "0.0", "0.1", 4], [1, "1.0", "1.1", 4, 5]], [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
        [[IGN, IGN, IGN, IGN, 4], [1, IGN, IGN, 4, 5]],
    ),
    "a sample without an image takes and drops one": (
        [[1, 2, 3], [1, IMG, 3]], [[1, 1, 1], [1, 1, 1]], [[1, 2, 3], [1, 2, 3]], 2,
        [[1, 2, 3, None], [1, "1.0", "1.1", 3]], [[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 2, 3, IGN], [1, IGN, IGN, 3]],
    ),
    "a sample without an image takes none": (
        [[1, 2, 3], [1, IMG, 3]], [[1, 1, 1], [1, 1, 1]], [[1, 2, 3], [1, 2, 3]], 1,
        [[1, 2, 3, None], [1, "0.0", "0.1", 3]], [[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 2, 3, IGN], [1, IGN, IGN, 3]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_fusing_equals_the_sequence_written_out(name, dtype):
    ids, mask, labels, count, sequences, wanted_mask, wanted_labels = CASES[name]
    fuser = Fuser()
    mask = torch.tensor(mask, dtype=dtype)
    got = fuser.prepare_inputs_labels_for_multimodal(
        torch.tensor(ids), mask, None, torch.tensor(labels), images_of(count)
    )
    assert got[0] is None and got[2] is None
    torch.testing.assert_close(got[3], written_out(fuser, sequences, len(sequences[0])))
    assert got[1].dtype == dtype and torch.equal(got[1], torch.tensor(wanted_mask, dtype=dtype))
    assert torch.equal(got[4], torch.tensor(wanted_labels))
    bare = fuser.prepare_inputs_labels_for_multimodal(torch.tensor(ids), None, None, None, images_of(count))
    assert bare[1] is None and bare[4] is None and torch.equal(bare[3], got[3])


def test_packing_drops_padding_and_aligns_rows():
    ids, mask, *_ = CASES["ragged, padded on the right"]
    fuser = Fuser()
    left = fuser.fuse(torch.tensor(ids), torch.tensor(mask), images_of(4), None, pack="left")
    sequences = [[1, "0.0", "0.1", 3, "1.0", "1.1"], [None, None, 1, 2, "2.0", "2.1"], [None] * 3 + [5, "3.0", "3.1"]]
    torch.testing.assert_close(left.inputs_embeds, written_out(fuser, sequences, 6))
    assert left.real.tolist() == [[item is not None for item in row] for row in sequences]
    right = fuser.fuse(torch.tensor([[0, 0, IMG, 4]]), torch.tensor([[0, 0, 1, 1]]), images_of(1), None, pack="right")
    torch.testing.assert_close(right.inputs_embeds, written_out(fuser, [["0.0", "0.1", 4]], 3))
    assert right.real.all()


def test_several_images_of_one_entry_share_a_slot():
    fuser, ids = Fuser(), torch.tensor([[1, IMG, 2], [1, IMG, 2]])
    want = [[1, "0.0", "0.1", "1.0", "1.1", 2], [1, "2.0", "2.1", "3.0", "3.1", 2]]
    for images in (images_of(4).view(2, 2, 3, 1, 1), list(images_of(4).split(2))):
        got = fuser.prepare_inputs_labels_for_multimodal(ids, None, None, None, images)[3]
        torch.testing.assert_close(got, written_out(fuser, want, 6))
    uneven = [images_of(4)[0], images_of(4)[1:4]]  # one image [C, H, W], then three
    got = fuser.prepare_inputs_labels_for_multimodal(ids, None, None, None, uneven)[3]
    want = [[1, "0.0", "0.1", 2, *[None] * 4], [1, "1.0", "1.1", "2.0", "2.1", "3.0", "3.1", 2]]
    torch.testing.assert_close(got, written_out(fuser, want, 8))
    with pytest.raises(ValueError, match="found entries"):
        fuser.image_slots([torch.zeros(3, 1, 1), torch.zeros(3, 2, 2)])


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (2, "2 given, expected 4.*sample 1 has 2 placeholders and finds 1 images left"),
        (6, "6 given, expected 4.*by sample: \\[1, 2, 0, 1\\]"),
    ],
)
def test_wrong_number_of_images_names_the_sample(count, sentence):
    ids = torch.tensor([[1, IMG, 2], [IMG, IMG, 2], [1, 2, 3], [1, 2, IMG]])
    with pytest.raises(ValueError, match=sentence):
        Fuser().prepare_inputs_labels_for_multimodal(ids, None, None, None, images_of(count))


def test_shapes_are_checked():
    ids = torch.tensor([[1, IMG, 2]])
    with pytest.raises(ValueError, match=r"labels has shape \[1, 2\]; input_ids has \[1, 3\]"):
        Fuser().prepare_inputs_labels_for_multimodal(ids, None, None, torch.tensor([[1, 2]]), images_of(1))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 4\]"):
        Fuser().prepare_inputs_labels_for_multimodal(ids, torch.ones(1, 4), None, None, images_of(1))


def test_one_token_passes_through_on_a_cache_but_a_lone_image_is_fused():
    fuser, cache = Fuser(), [(torch.zeros(1, 2, 3, 6), torch.zeros(1, 2, 6, 3))]
    ids, mask = torch.tensor([[7]]), torch.tensor([[1, 0, 1]])
    got = fuser.prepare_inputs_labels_for_multimodal(ids, mask, cache, None, images_of(1))
    assert got[0] is ids and got[3] is None and got[1].tolist() == [[1] * 7]
    kept = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])  # already as long as cache and token: a prompt's padding stays
    assert fuser.prepare_inputs_labels_for_multimodal(ids, kept, cache, None, images_of(1))[1] is kept
    assert fuser.prepare_inputs_labels_for_multimodal(ids, mask, cache, None, None)[1] is mask
    lone = fuser.prepare_inputs_labels_for_multimodal(torch.tensor([[IMG]]), None, None, None, images_of(1))
    torch.testing.assert_close(lone[3], written_out(fuser, [["0.0", "0.1"]], 2))


def test_gradients_reach_tokens_and_projector_and_an_unused_image_gives_zero():
    fuser = Fuser()
    embeds = fuser.prepare_inputs_labels_for_multimodal(torch.tensor([[1, IMG, 7]]), None, None, None, images_of(1))[3]
    embeds.sum().backward()
    assert fuser.table.weight.grad.sum(1).nonzero().flatten().tolist() == [1, 7]
    assert (fuser.weight.grad > 0).all()
    fuser = Fuser()
    embeds = fuser.prepare_inputs_labels_for_multimodal(torch.tensor([[1, 2, 7]]), None, None, None, images_of(1))[3]
    embeds.sum().backward()
    assert torch.equal(fuser.weight.grad, torch.zeros(4))


def test_adapter_tuning_detaches_all_text_but_start_and_end():
    fuser = Fuser(tune_mm_mlp_adapter=True, mm_use_im_start_end=True)
    ids, labels = torch.tensor([[1, 5, IMG, 6, 2]]), torch.tensor([[1, 5, 44, 6, 2]])
    got = fuser.prepare_inputs_labels_for_multimodal(ids, None, None, labels, images_of(1))
    assert got[4].tolist() == [[1, 5, IGN, IGN, 6, 2]]  # <end> keeps its own label
    got[3].sum().backward()
    assert fuser.table.weight.grad.sum(1).nonzero().flatten().tolist() == [5, 6]
