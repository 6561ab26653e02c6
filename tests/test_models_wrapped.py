"""Models inside what training wraps around them: adapters in front of projections, DDP, FSDP, two processes."""

import copy

import pytest
import torch
from internvl_kernels.models.prefix_lm import convert_hf_causal_lm_to_prefix_lm
from torch import nn

from tests import llava_models
from tests.hf_models import model_of
from tests.qllama_models import VOCAB, WIDTH, tiny
from tests.test_models_mpt import tiny_model


def prefix_lm(name):
    ids = torch.randint(2, 40, (2, 9))
    opened = (torch.arange(9) < 4).long().expand(2, -1)
    return convert_hf_causal_lm_to_prefix_lm(model_of(name)), {"input_ids": ids, "bidirectional_mask": opened}


def mpt():
    ids = torch.randint(0, 50, (2, 9))
    return tiny_model(alibi=True, prefix_lm=True), {"input_ids": ids, "prefix_mask": torch.arange(9).expand(2, -1) < 4}


def qllama():
    ids, vision = torch.randint(2, VOCAB, (2, 12)), torch.randn(2, 5, WIDTH)
    return tiny(), {"input_ids": ids, "vision_hidden_states": vision, "use_zero_attention_mask": True}


def llava(kind):
    data = llava_models.batch()
    return llava_models.model_of(kind, mm_prefix="images"), data


# name -> (model and batch, its projections)
MODELS = {
    "prefix gpt_neox": (lambda: prefix_lm("gpt_neox"), ("query_key_value", "dense")),
    "prefix bloom": (lambda: prefix_lm("bloom"), ("query_key_value",)),
    "prefix llama": (lambda: prefix_lm("llama"), ("q_proj", "k_proj", "v_proj", "o_proj")),
    "mpt": (mpt, ("Wqkv", "out_proj")),
    "qllama": (qllama, ("q_proj", "k_proj", "v_proj", "down_proj")),
    "llava llama": (lambda: llava("llama"), ("q_proj", "v_proj")),
    "llava mpt": (lambda: llava("mpt"), ("Wqkv",)),
}


def made(name):
    torch.manual_seed(0)
    model, batch = MODELS[name][0]()
    return model, {**batch, "use_cache": False, "labels": batch.get("labels", batch["input_ids"])}


class Adapted(nn.Module):
    """A linear layer, frozen, plus a low-rank one that starts at zero: what LoRA puts in its place."""

    def __init__(self, layer: nn.Linear, rank: int = 2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        layer = copy.deepcopy(self.layer)
        layer.weight.data += self.up.weight @ self.down.weight
        return layer


def exchange(model, replace) -> int:
    """``replace(name, module)`` -> another module or None, on all of them; how many were exchanged."""
    chosen = [(path, replace(path.rpartition(".")[2], module)) for path, module in model.named_modules()]
    for path, new in (pair for pair in chosen if pair[1] is not None):
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return sum(new is not None for _, new in chosen)


def steps(model, batch, count=4):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(parameters, lr=0.05), []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_adapters_in_the_projections(name):
    """They change nothing at first, are all that learns, and merge into the weights."""
    model, batch = made(name)
    with torch.no_grad():
        want = model(**batch).logits
    model.requires_grad_(False)
    projections = MODELS[name][1]
    count = exchange(model, lambda leaf, m: Adapted(m) if leaf in projections and isinstance(m, nn.Linear) else None)
    assert count >= len(projections)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, want)
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    losses = steps(model.train(), batch, 6)
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(model.named_parameters())[key], value) for key, value in frozen.items())
    if not name.startswith("llava"):  # there some layers are the tower's, whose last layer is not used
        assert all(bool(p.grad.abs().sum() > 0) for key, p in model.named_parameters() if "up.weight" in key)
    with torch.no_grad():
        want = model.eval()(**batch).logits
        exchange(model, lambda _, m: m.merged() if isinstance(m, Adapted) else None)
        scale = float(want.abs().max())
        torch.testing.assert_close(model(**batch).logits, want, atol=2e-5 * scale, rtol=1e-4)


@pytest.fixture
def process_group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(model):
    """FSDP by the names that the class gives: each block, then the rest."""
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    names = [name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()]
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    assert len(blocks) >= 2, names
    for block in blocks:
        torch.distributed.fsdp.fully_shard(block, mesh=mesh)
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    return model


@pytest.mark.parametrize("name", ["mpt", "qllama", "llava llama", "llava mpt"])
def test_ddp_and_fsdp(name, process_group):
    model, batch = made(name)
    model.train()
    want = steps(copy.deepcopy(model), batch, 3)
    unused = name.startswith("llava") or name == "qllama"  # a tower's last layer; the last cross attention
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=unused)
    torch.testing.assert_close(steps(wrapped, batch, 3), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steps(sharded(copy.deepcopy(model)), batch, 3), want, atol=1e-5, rtol=1e-5)


def train_in(rank: int, world: int, store: str, name: str, queue) -> None:
    """One process: DDP, then FSDP, each on its row of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model, batch = made(name)
    model.train()
    row = {key: t[rank : rank + 1] if isinstance(t, torch.Tensor) else t for key, t in batch.items()}
    found = [
        steps(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), row, 3),
        steps(sharded(copy.deepcopy(model)), row, 3),
    ]
    queue.put((rank, found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mpt", "prefix llama"])
def test_two_processes_learn_as_one(name, tmp_path):
    """Each holds a row; the mean of their losses is the loss of both rows in one process."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = [(rank, 2, str(tmp_path / "store"), name, queue) for rank in range(2)]
    processes = [context.Process(target=train_in, args=args) for args in arguments]
    for process in processes:
        process.start()
    by_rank = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    model, batch = made(name)
    want = torch.tensor(steps(model.train(), batch, 3))
    for way in range(2):
        mean = torch.tensor([by_rank[rank][way] for rank in range(2)]).mean(0)
        torch.testing.assert_close(mean, want, atol=1e-4, rtol=1e-4)
