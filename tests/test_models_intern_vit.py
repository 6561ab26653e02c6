"""InternViT against the same arithmetic written out: gradients, checkpointing, sizes, compilation, refusals."""

import copy

import pytest
import torch
from internvl_kernels.models.internvl_14b import (
    InternVisionConfig,
    InternVisionModel,
)
from torch.nn import functional

from tests.largest_tensor import LargestTensor

VISION = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "patch_size": 4,
    "image_size": 16,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_vision(**changes):
    torch.manual_seed(7)
    return InternVisionModel(InternVisionConfig(**{**VISION, "initializer_range": 0.2, **changes})).eval()


def dense_vision(model, images):
    """InternViT from its parameters, in their dtype, attention in dense memory."""
    config, embed = model.config, model.embeddings

    def norm(module, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt() * module.weight

    x = embed.patch_embedding(images).flatten(2).transpose(1, 2)
    x = torch.cat([embed.class_embedding.expand(len(x), -1, -1), x], 1) + embed.position_embedding
    for layer in model.encoder.layers:
        q, k, v = layer.attn.qkv(norm(layer.norm1, x)).chunk(3, -1)
        if config.qk_normalization:
            q, k = norm(layer.attn.q_norm, q), norm(layer.attn.k_norm, k)
        q, k, v = (t.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + layer.ls1 * layer.attn.proj(out.transpose(1, 2).flatten(2))
        x = x + layer.ls2 * layer.mlp.fc2(functional.gelu(layer.mlp.fc1(norm(layer.norm2, x))))
    return x


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "qk_normalization": False, "num_attention_heads": 2}])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "checkpointed"])
def test_vision_states_and_gradients_equal_dense_attention(changes, train):
    model = tiny_vision(initializer_factor=1.0, **changes).train(train)  # training recomputes by default
    oracle = copy.deepcopy(model).double()
    images = torch.rand(2, 3, 16, 16)
    for target, out in (
        (model, model(images).last_hidden_state),
        (oracle, dense_vision(oracle, images.double())),
    ):
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        target.out = out.detach()
    torch.testing.assert_close(model.out.double(), oracle.out, atol=2e-4, rtol=2e-4)
    for (name, mine), wanted in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), wanted.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_vision_layers_checkpoint_by_default_and_on_request():
    model, images = tiny_vision().train(), torch.rand(1, 3, 16, 16)
    runs = []
    model.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *_: runs.append(1))

    def gradient():
        runs.clear()
        model.zero_grad()
        model(images).last_hidden_state.sum().backward()
        return model.embeddings.position_embedding.grad.clone(), len(runs)

    by_default, twice = gradient()
    assert twice == 2
    model.gradient_checkpointing_disable()
    plain, once = gradient()
    assert once == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    reentrant, twice = gradient()
    assert twice == 2
    torch.testing.assert_close(by_default, plain)
    torch.testing.assert_close(reentrant, plain)


def test_stochastic_depth_drops_whole_branches():
    model = tiny_vision(drop_path_rate=1.0, num_hidden_layers=3)
    rates = [layer.drop_path1.drop_prob for layer in model.encoder.layers]
    assert rates == [0.0, 0.5, 1.0]
    states = model.train()(torch.rand(2, 3, 16, 16), output_hidden_states=True).hidden_states
    assert torch.equal(states[3], states[2]) and not torch.equal(states[1], states[0])
    states = model.eval()(torch.rand(2, 3, 16, 16), output_hidden_states=True).hidden_states
    assert not torch.equal(states[3], states[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vision_in_half_precision(dtype):
    model, images = tiny_vision(), torch.rand(2, 3, 20, 12)
    exact = model(images).last_hidden_state
    half = copy.deepcopy(model).to(dtype)(images)
    assert half.last_hidden_state.dtype == half.pooler_output.dtype == dtype
    torch.testing.assert_close(half.last_hidden_state.float(), exact, atol=0.1, rtol=0.05)
    with torch.autocast("cpu", dtype):
        mixed = model(images).last_hidden_state
    torch.testing.assert_close(mixed.float(), exact, atol=0.1, rtol=0.05)


def test_vision_holds_nothing_of_the_size_of_the_scores():
    model = tiny_vision().train()
    with LargestTensor() as largest:
        model(torch.rand(1, 3, 96, 96)).last_hidden_state.sum().backward()
    patches = 1 + 24 * 24
    assert largest.numel <= patches * 3 * 24 < patches * patches / 4


@pytest.mark.slow
def test_vision_compiles_in_one_graph():
    model, images = tiny_vision(num_hidden_layers=1), torch.rand(2, 3, 16, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).last_hidden_state, model(images).last_hidden_state)


def test_vision_tower_runs_at_other_sizes_after_resizing():
    """The interpolated table of a size and the resized parameter give the same states there."""
    model, images = tiny_vision(), torch.rand(2, 3, 24, 24)
    before = model(images).last_hidden_state
    model.resize_pos_embeddings(16, 24, 4)
    assert model.config.image_size == 24
    torch.testing.assert_close(model(images).last_hidden_state, before)
    with pytest.raises(ValueError, match="this model has image_size=24 and patch_size=4"):
        model.resize_pos_embeddings(16, 24, 4)


def test_positions_are_interpolated_to_any_grid():
    embed = tiny_vision().embeddings
    assert embed.positions(4, 4) is embed.position_embedding
    wide = embed.positions(3, 7)
    assert wide.shape == (1, 1 + 21, 24) and torch.equal(wide[:, 0], embed.position_embedding[:, 0])
    image = embed.position_embedding[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    wanted = functional.interpolate(image, (3, 7), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(wide[:, 1:], wanted)


@pytest.mark.parametrize(
    "call,message",
    [
        ({}, "neither pixel_values nor pixel_embeds"),
        (
            {"pixel_values": torch.zeros(3, 16, 16)},
            r"pixel_values has shape \[3, 16, 16\]; expected \[batch, channels = 3",
        ),
        ({"pixel_values": torch.zeros(1, 4, 16, 16)}, "channels = 3"),
        ({"pixel_values": torch.zeros(1, 3, 3, 16)}, r"at least one patch \(4 x 4\)"),
        ({"pixel_embeds": torch.zeros(1, 5, 23)}, "hidden_size = 24"),
    ],
)
def test_wrong_images_name_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        tiny_vision()(**call)
