"""The CUDA kernels of clip_qk_layernorm in the emulator, against float64."""

import functools
import itertools

import pytest
import torch
from emulator import EmulatorError, Session
from emulator.session import machine
from internvl_kernels import reference
from internvl_kernels.testing import layernorm_bounds

DEVICE = {"multiprocessors": 2, "compute_capability": 80, "max_shared_bytes": 163 * 1024}
LITTLE_SHARED = DEVICE | {"compute_capability": 86, "max_shared_bytes": 99 * 1024}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


class Call:
    """One fused projection and its gradients, in memory whose gaps must not be touched."""

    def __init__(
        self,
        rows,
        q_width,
        k_width,
        dtype,
        *,
        clip=None,
        parameters="qkb",
        parameter_dtype=None,
        pad=0,
        device=DEVICE,
    ):
        self.device = device
        self.rows, self.q_width, self.k_width, self.clip = rows, q_width, k_width, clip
        self.dtype, self.parameter_dtype = dtype, parameter_dtype or dtype
        width = q_width + 2 * k_width
        self.qkv = torch.randn(rows, width + pad).to(dtype)[:, :width]
        widths = {"q_weight": q_width, "q_bias": q_width, "k_weight": k_width, "k_bias": k_width}
        self.parameters = {
            name: torch.randn(w).to(self.parameter_dtype)
            for name, w in widths.items()
            if name[0] in parameters and (name.endswith("weight") or "b" in parameters)
        }
        self.grads = {
            f"grad_{name}": torch.randn(rows, w + pad).to(dtype)[:, :w]
            for name, w in (("q", q_width), ("k", k_width), ("v", k_width))
        }

    def arguments(self, session):
        parameters = {name: session.input(name, tensor) for name, tensor in self.parameters.items()}
        return {
            "dtype": name_of(self.dtype),
            "parameter_dtype": name_of(self.parameter_dtype),
            "rows": self.rows,
            "q_width": self.q_width,
            "k_width": self.k_width,
            "qkv_stride": self.qkv.stride(0),
            "clip": self.clip,
            "eps": EPS,
            "qkv": session.input("qkv", self.qkv),
            **parameters,
        }

    def forward(self, **options):
        """q, k, v and the statistics."""
        session = Session(**options)
        shapes = {"q": self.q_width, "k": self.k_width, "v": self.k_width}
        results = {name: session.output(name, self.rows, width, dtype=self.dtype) for name, width in shapes.items()}
        results["statistics"] = session.output("statistics", self.rows, 4)
        arguments = self.arguments(session) | {name: tensor.data_ptr() for name, tensor in results.items()}
        session.check(machine.clip_qk_layernorm_fwd(arguments, self.device))
        self.session = session
        return results

    def backward(self, statistics, without=(), **options):
        """The gradients of qkv and of the parameters."""
        session = Session(**options)
        arguments = self.arguments(session) | {"statistics": session.input("statistics", statistics)}
        for name, grad in self.grads.items():
            if name not in without:
                arguments |= {name: session.input(name, grad), f"{name}_stride": grad.stride(0)}
        results = {"grad_qkv": session.output("grad_qkv", *self.qkv.shape, dtype=self.dtype)}
        for name, parameter in self.parameters.items():
            results[f"d{name}"] = session.output(f"d{name}", parameter.numel())
        arguments |= {name: tensor.data_ptr() for name, tensor in results.items()}
        size = machine.clip_qk_layernorm_bwd_workspace_bytes(arguments, self.device)
        workspace = session.workspace("workspace", size).data_ptr() if size else 0
        session.check(machine.clip_qk_layernorm_bwd(arguments, self.device, workspace))
        self.session = session
        return results

    def truth(self, without=()):
        """The same in float64."""
        qkv = self.qkv.double().requires_grad_()
        wide = {name: tensor.double().requires_grad_() for name, tensor in self.parameters.items()}
        given = [wide.get(name) for name in ("q_weight", "q_bias", "k_weight", "k_bias")]
        q, k, v = reference.clip_qk_layernorm(qkv, self.q_width, self.k_width, self.clip, *given, EPS)[:3]
        grads = [
            torch.zeros_like(out) if name in without else self.grads[name].double()
            for name, out in zip(self.grads, (q, k, v), strict=True)
        ]
        leaves = [qkv, *wide.values()]
        found = torch.autograd.grad((q, k, v), leaves, grads)
        names = ["grad_qkv", *(f"d{name}" for name in wide)]
        return {"q": q.detach(), "k": k.detach(), "v": v.detach(), **dict(zip(names, found, strict=True))}

    def check(self, results, without=()):
        if self.rows == 0:
            return
        truth = self.truth(without)
        x = self.qkv if self.clip is None else self.qkv.clamp(-self.clip, self.clip)
        spans = {"q": (0, self.q_width), "k": (self.q_width, self.q_width + self.k_width)}
        spans["v"] = (spans["k"][1], x.shape[1])
        for part, (begin, end) in spans.items():
            grad = self.grads[f"grad_{part}"]
            grad = torch.zeros_like(grad) if f"grad_{part}" in without else grad
            weight, bias = self.parameters.get(f"{part}_weight"), self.parameters.get(f"{part}_bias")
            dx, true_dx = (t["grad_qkv"][:, begin:end] for t in (results, truth))
            if weight is None:
                assert torch.equal(results[part], x[:, begin:end]), part
                assert torch.equal(dx.double(), true_dx), f"{part} dx"
                continue
            bounds = layernorm_bounds(x[:, begin:end], weight, bias, EPS, grad)
            pairs = {"y": (results[part], truth[part]), "dx": (dx, true_dx)}
            pairs["dweight"] = (results[f"d{part}_weight"], truth[f"d{part}_weight"])
            if bias is not None:
                pairs["dbias"] = (results[f"d{part}_bias"], truth[f"d{part}_bias"])
            for key, (got, right) in pairs.items():
                worst = ((got.double() - right).abs() / bounds[key]).max() if got.numel() else 0
                assert worst <= 1, f"{part} {key}: {worst:.2f} x the bound"
            cut = self.qkv[:, begin:end].double().abs() > (self.clip or float("inf"))
            assert (dx[cut] == 0).all()

    def run(self, without=(), **options):
        results = self.forward(**options)
        results |= self.backward(results["statistics"], without, **options)
        self.check(results, without)
        return results


# One warp, several warps, rows of an odd width (scalar accesses), q and k that share few threads.
WIDTHS = ((1, 1), (7, 5), (64, 16), (256, 64), (300, 512), (1025, 8), (2048, 256))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("q_width,k_width", WIDTHS)
def test_against_float64(q_width, k_width, dtype):
    for clip, parameter_dtype in ((None, dtype), (1.5, torch.float32)):
        Call(5, q_width, k_width, dtype, clip=clip, parameter_dtype=parameter_dtype).run()


# Of the backward: dtype, width, and the stages of a block with 163 and with 99 KiB of shared memory (0: none at all).
WIDE = (
    (torch.bfloat16, 8192, 2, 2),
    (torch.bfloat16, 8200, 2, 1),
    (torch.float16, 8201, 2, 1),
    (torch.bfloat16, 16384, 2, 1),
    (torch.float16, 16392, 0, 0),
    (torch.float32, 8192, 2, 1),
    (torch.float32, 8201, 1, 0),
    (torch.float32, 16384, 1, 0),
)


@pytest.mark.parametrize("device", (DEVICE, LITTLE_SHARED), ids=("163KiB", "99KiB"))
@pytest.mark.parametrize("dtype,width,stages,few_stages", WIDE, ids=lambda value: str(value).removeprefix("torch."))
def test_wide_rows(dtype, width, stages, few_stages, device):
    """16 and 32 columns a thread, one row ahead or none, and rows that a block does not hold."""
    call = Call(4, width, 16, dtype, clip=1.5, parameter_dtype=torch.float32, device=device)
    call.run()
    kernel = call.session.kernels()["clip_qk_layernorm_bwd"]
    assert kernel["threads"] == 512
    row_bytes = 2 * 512 * (16 if width <= 8192 else 32) * dtype.itemsize  # x and dy
    assert kernel["shared_bytes"] == 256 + (stages if device is DEVICE else few_stages) * row_bytes
    assert kernel["shared_bytes"] <= device["max_shared_bytes"]


@pytest.mark.parametrize("pad", (1, 8))
def test_strided_rows(pad):
    for dtype in DTYPES:
        Call(4, 48, 16, dtype, clip=1.0, pad=pad).run()


def test_rows_that_share_memory():
    call = Call(4, 48, 16, torch.bfloat16, clip=1.0)
    call.qkv = call.qkv[:1].expand(4, -1)
    call.grads["grad_q"] = call.grads["grad_q"][:1].expand(4, -1)
    call.run()


@pytest.mark.parametrize("parameters", ("", "q", "kb", "qk"))
def test_without_a_norm(parameters):
    for dtype in DTYPES:
        results = Call(6, 40, 24, dtype, clip=0.7, parameters=parameters).run()
        for part, letter in enumerate("qk"):
            statistics = results["statistics"][:, 2 * part : 2 * part + 2]
            assert (statistics == 0).all() == (letter not in parameters)


def test_absent_gradients():
    for without in itertools.combinations(("grad_q", "grad_k", "grad_v"), 2):
        Call(6, 64, 16, torch.bfloat16, clip=1.0).run(without=without)


@pytest.mark.parametrize("rows", (0, 1, 23, 64))
def test_rows(rows):
    """Fewer and more rows than workers; none at all leaves zero gradients."""
    call = Call(rows, 64, 72, torch.bfloat16, clip=1.0, parameter_dtype=torch.float32)
    results = call.run()
    if rows == 0:
        assert all((results[f"d{name}"] == 0).all() for name in call.parameters)


def test_nan_passes_the_clip():
    call = Call(3, 8, 8, torch.float32, clip=1.0, parameters="")
    call.qkv[1, 3] = torch.nan
    results = call.forward()
    assert results["q"][1, 3].isnan() and results["q"].isnan().sum() == 1
    assert call.backward(results["statistics"])["grad_qkv"][1, 3] == 0


def test_statistics_at_an_odd_address():
    call = Call(5, 64, 16, torch.bfloat16)
    results = call.forward()
    moved = torch.empty(21)[1:].view(5, 4).copy_(results["statistics"])
    call.check(results | call.backward(moved))


def test_constant_rows():
    call = Call(4, 64, 64, torch.float32)
    call.qkv[2] = 3.0
    call.run()


def test_same_bits_in_any_order():
    call = Call(37, 264, 64, torch.bfloat16, clip=1.0)
    first, second = (call.run(seed=seed) for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_each_element_is_read_once():
    """One pass over memory: what the kernels load is x once, and x and dy once in the backward."""
    call = Call(16, 2048, 2048, torch.bfloat16, parameters="qkb")
    results = call.forward()
    size = call.qkv.numel() * 2
    kernel = call.session.kernels()["clip_qk_layernorm"]
    parameters = 4 * 16 * 2048 * 2  # of every row
    assert kernel["ld_global_bytes"] == size + parameters
    assert kernel["st_global_bytes"] == size + 16 * 16
    call.backward(results["statistics"])
    kernel = call.session.kernels()["clip_qk_layernorm_bwd"]
    assert kernel["cp_async_bytes"] == 2 * 2 * 16 * 2048 * 2  # x and dy of q and k


@pytest.mark.parametrize("kernel", ("clip_qk_layernorm", "clip_qk_layernorm_bwd", "norm_reduce"))
def test_every_missing_barrier_and_wait_is_noticed(kernel):
    call = Call(6, 2048, 64, torch.bfloat16)
    statistics = call.forward()["statistics"]
    if kernel == "clip_qk_layernorm":
        run = call.forward
    else:
        run = functools.partial(call.backward, statistics)
        run()
    sites = call.session.kernels()[kernel]["synchronising"]
    assert sites
    for site in sites:
        with pytest.raises(EmulatorError):
            run(skip=site)
