"""One table of backends. Each says why it cannot run; an explicit request never falls back."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import reference, registration, variables

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """A row: ``build()`` = why this installation cannot run it at all, ``call()`` = why not for these inputs."""

    name: str
    where: str
    build: Callable[[], list[str]]
    call: Callable[[str, torch.dtype], list[str]]
    ops: dict[str, Callable]
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(default_factory=dict)  # of operators that take fewer than `call`

    def here(self) -> list[str]:
        """Reasons that hold on this machine whatever the inputs are; empty when it can run."""
        return self.build()

    def reasons(self, tensor: Tensor) -> list[str]:
        """Why this backend cannot take ``tensor`` (q or qkv); empty when it can."""
        return self.build() + self.call(tensor.device.type, tensor.dtype)

    def op_reasons(self, op: str, device: str, dtype: torch.dtype) -> list[str]:
        """Why it cannot run ``op`` there with that dtype; empty when it can."""
        taken = self.dtypes.get(op, (dtype,))
        own = [] if dtype in taken else [f"{op} with {dtype}; this backend takes {', '.join(map(str, taken))}"]
        return self.build() + self.call(device, dtype) + own


def _library() -> list[str]:
    return [registration.LIBRARY_ERROR] if registration.LIBRARY_ERROR else []


def _cpu() -> list[str]:
    return _library() + ([registration.ISA_ERROR] if registration.ISA_ERROR else [])


def _cuda() -> list[str]:
    reasons = _library()
    if not registration.build_info().get("cuda"):
        reasons.append("this build holds no CUDA kernels")
    if not torch.cuda.is_available():
        return [*reasons, "no CUDA device"]
    found = _compute_capabilities()
    if max(found) < (8, 0):
        versions = ", ".join(f"{major}.{minor}" for major, minor in found)
        reasons.append(f"the devices have compute capability {versions}; needed: 8.0 or newer")
    return reasons


def _compute_capabilities() -> tuple[tuple[int, int], ...]:
    return tuple(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))


# A tracer cannot follow the questions to the driver. torch.compiler.assume_constant_result would set just this mark,
# and import the whole compiler (and Triton) with the package to do so.
_compute_capabilities._dynamo_marked_constant = True


def cuda_kernels(capability: tuple[int, int]) -> str:
    """Which attention kernels a device prefers, the newest that it runs: the rule of csrc/cuda/kernel_table.h."""
    hopper = any(arch.startswith("90a") for arch in registration.build_info().get("cuda_archs", "").split(","))
    return "sm90" if hopper and capability == (9, 0) else "sm80"


def _interpreted() -> bool:
    """Triton's kernels run in its interpreter, on CPU tensors: for tests, so only when the backend is asked for."""
    return variables.triton_interpret()


def _triton() -> list[str]:
    reasons = [] if _TRITON_INSTALLED else ["Triton is not installed: pip install triton"]
    if not torch.cuda.is_available() and not _interpreted():
        reasons.append("no CUDA device")
    return reasons


def _triton_call(device_type: str, dtype: torch.dtype) -> list[str]:
    return _on("cpu" if device_type == "cpu" and _interpreted() else "cuda")(device_type, dtype)


def _triton_prefix_attn(*arguments, **options):
    from .triton_kernels import ops  # here, so that Triton is imported when it is used

    return ops.prefix_attn(*arguments, **options)


def _triton_clip_qk_layernorm(*arguments):
    from .triton_kernels import ops

    return ops.clip_qk_layernorm(*arguments)


def _on(device: str) -> Callable[[str, torch.dtype], list[str]]:
    def check(device_type: str, dtype: torch.dtype) -> list[str]:
        reasons = [] if device_type == device else [f"tensors are on {device_type}; this backend needs {device}"]
        if dtype not in DTYPES:
            reasons.append(f"dtype {dtype}; this backend takes {', '.join(map(str, DTYPES))}")
        return reasons

    return check


def _any_float(_: str, dtype: torch.dtype) -> list[str]:
    return [] if dtype.is_floating_point else [f"dtype {dtype}; this backend takes floating-point dtypes"]


_OPERATORS = {"prefix_attn": registration.prefix_attn, "clip_qk_layernorm": registration.clip_qk_layernorm}
_TRITON_OPERATORS = {"prefix_attn": _triton_prefix_attn, "clip_qk_layernorm": _triton_clip_qk_layernorm}

BACKENDS = {
    b.name: b
    for b in (
        Backend(
            "cuda",
            "compute capability >= 8.0",
            _cuda,
            _on("cuda"),
            _OPERATORS,
            {"prefix_attn": (torch.bfloat16, torch.float16)},
        ),
        Backend("triton", "GPUs that Triton supports", _triton, _triton_call, _TRITON_OPERATORS),
        Backend("cpu", "any processor", _cpu, _on("cpu"), _OPERATORS),
        Backend(
            "reference",
            "any device, when asked for",
            lambda: [],
            _any_float,
            {"prefix_attn": reference.prefix_attn, "clip_qk_layernorm": reference.clip_qk_layernorm},
        ),
    )
}


def select(op: str, tensor: Tensor, requested: str | None = None) -> Callable:
    """The implementation of ``op`` for ``tensor``; ``requested`` or ``INTERNVL_BACKEND`` is binding.

    Raises: ValueError (unknown name); NotImplementedError (it cannot run; every reason is listed).
    """
    if requested is None:
        requested = variables.default_backend()
    choose = _choose if torch.compiler.is_compiling() else _remembered_choice  # a trace cannot look into the cache
    return choose(op, tensor.device.type, tensor.dtype, requested)


def _choose(op: str, device: str, dtype: torch.dtype, requested: str | None) -> Callable:
    if requested is not None:
        if requested not in BACKENDS:
            raise ValueError(f"backend is {requested!r}; allowed: {', '.join(map(repr, BACKENDS))}")
        backend = BACKENDS[requested]
        reasons = backend.op_reasons(op, device, dtype)
        if reasons:
            raise NotImplementedError(f"{op}: backend {requested!r} cannot run: {'; '.join(reasons)}")
        return backend.ops[op]
    refusals = []
    for backend in BACKENDS.values():
        if backend.name == "reference" or (backend.name == "triton" and device == "cpu" and _interpreted()):
            continue  # dense memory, and the interpreter: only on request
        reasons = backend.op_reasons(op, device, dtype)
        if not reasons:
            return backend.ops[op]
        refusals.append(f"{backend.name}: {'; '.join(reasons)}")
    raise NotImplementedError(
        f"{op}: no backend can run on {device} with {dtype}\n  "
        + "\n  ".join(refusals)
        + "\nbackend='reference' runs anywhere in dense memory"
    )


_remembered_choice = functools.cache(_choose)
