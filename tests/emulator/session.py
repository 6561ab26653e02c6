"""One run of the emulator: memory in, launches, then what was wrong."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from . import _emulator as machine
except ImportError as error:
    raise ImportError("the emulator is not built: `make emulator` builds it (`make test` does so first)") from error


WATCHED = 1 << 28  # elements; of larger strided views the gaps are not watched


class EmulatorError(AssertionError):
    """What the emulator found wrong with a kernel."""


class Session:
    """Starts the emulator afresh; there is one at a time.

    Args:
        seed: order of blocks, warps and lanes.
        sum_order: another order of the sums inside of an mma; 0: ascending.
        skip: "file:line" of a barrier or wait that kernels shall leave out.
        bank_conflicts: count how accesses fall on banks and sectors (``kernels()[name]["accesses"]``).
        toward_zero: mma sums truncate, as tensor cores may.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        sum_order: int = 0,
        skip: str = "",
        bank_conflicts: bool = False,
        toward_zero: bool = False,
    ):
        machine.start(seed=seed, sum_order=sum_order, skip=skip, bank_conflicts=bank_conflicts, toward_zero=toward_zero)
        self._alive: list[Tensor] = []
        self._outputs: list[str] = []

    def input(self, name: str, tensor: Tensor | None) -> int:
        """The address of a tensor that kernels may read; gaps between its elements count as out of bounds. None: 0."""
        if tensor is None or tensor.numel() == 0:
            return 0
        self._alive.append(tensor)
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        known = None
        if span != tensor.numel() and span <= WATCHED:
            elements = torch.zeros(span, dtype=torch.uint8)
            elements.as_strided(tensor.shape, tensor.stride()).fill_(1)
            known = elements.repeat_interleave(tensor.element_size()).numpy().tobytes()
        machine.add(name, tensor.data_ptr(), span * tensor.element_size(), False, known)
        return tensor.data_ptr()

    def output(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A poisoned tensor that kernels must fill."""
        tensor = self.workspace(name, torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(shape)
        self._outputs.append(name)
        return tensor

    def workspace(self, name: str, size_bytes: int) -> Tensor:
        """Poisoned memory at a 256-byte address that kernels may write, and read after writing."""
        memory = torch.full((size_bytes + 256,), 0xFF, dtype=torch.uint8)
        self._alive.append(memory)
        start = -memory.data_ptr() % 256
        tensor = memory[start : start + size_bytes]
        if size_bytes:
            machine.add(name, tensor.data_ptr(), size_bytes, True, bytes(size_bytes))
        return tensor

    def reports(self) -> list[tuple[str, str, int]]:
        """(kind, text, occurrences) of everything that was wrong so far."""
        unwritten = ((name, machine.unwritten(name)) for name in self._outputs)
        return machine.reports() + [("unwritten", f"{n}: {b} bytes were never written", 1) for n, b in unwritten if b]

    def kinds(self) -> set[str]:
        """The kinds of the reports."""
        return {kind for kind, _, _ in self.reports()}

    def kernels(self) -> dict[str, dict]:
        """Per kernel: launches, instruction counts, accesses, barriers and waits."""
        return machine.kernels()

    def check(self, launch_error: str = "") -> None:
        """Raise ``EmulatorError`` when a launch was refused or anything was reported."""
        lines = [launch_error] * bool(launch_error)
        lines += [f"{kind} ({count} times): {text}" for kind, text, count in self.reports()]
        if lines:
            raise EmulatorError("\n".join(lines))
