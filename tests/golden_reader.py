"""Reads the golden bank (format: tests/golden_bank/README.md) and compares what a replay produced with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class Case:
    """One recorded case: ``id``, ``meta`` (config, construct, tolerance, notes), weights and calls."""

    def __init__(self, folder: str | Path, case_id: str):
        folder = Path(folder)
        self.id = case_id
        self.meta = json.loads((folder / f"{case_id}.json").read_text())
        files = self.meta["files"]
        self._tensors = load_file(folder / files["tensors"]) if "tensors" in files else {}
        self._shared = load_file(folder / files["shared"]) if "shared" in files else {}

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """The state dict, or the part of it under ``prefix`` with the prefix removed."""
        start = "w/" + prefix
        return {k[len(start) :]: v for k, v in {**self._shared, **self._tensors}.items() if k.startswith(start)}

    def calls(self) -> Iterator[dict]:
        """The calls in order, tensors decoded (fresh copies)."""
        for call in self.meta["calls"]:
            decoded = dict(call)
            for part in ("kwargs", "outputs", "grads"):
                if part in call:
                    decoded[part] = {name: self.decode(value) for name, value in call[part].items()}
            if "cotangent" in call:
                decoded["cotangent"] = self.decode(call["cotangent"])
            yield decoded

    def tolerance(self, call: dict) -> tuple[float, float]:
        """(atol, rtol) of a call; gradients take five times as much."""
        chosen = call.get("tolerance", self.meta["tolerance"])
        return chosen["atol"], chosen["rtol"]

    def decode(self, value):
        """A value of the file format as Python and torch objects."""
        if not isinstance(value, dict):
            return value
        if "$t" in value:
            return self._tensors[value["$t"]].clone()
        if "$shared" in value:
            return self._shared[value["$shared"]].clone()
        if "$zeros" in value:
            return torch.zeros(value["$zeros"]["shape"], dtype=getattr(torch, value["$zeros"]["dtype"]))
        if "$list" in value:
            return [self.decode(item) for item in value["$list"]]
        if "$tuple" in value:
            return tuple(self.decode(item) for item in value["$tuple"])
        if "$dict" in value:
            value = value["$dict"]
        if "$dtype" in value:
            return getattr(torch, value["$dtype"])
        if "$device" in value:
            return torch.device(value["$device"])
        return {name: self.decode(item) for name, item in value.items()}


def case_ids(folder: str | Path) -> list[str]:
    """Every case of the bank, in its own order."""
    return [entry["id"] for entry in json.loads((Path(folder) / "index.json").read_text())]


def leaves(value, path: str = "") -> Iterator[tuple[str, object]]:
    """(path, leaf) of nested lists, tuples and dicts."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, f"{path}/{name}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}/{index}")
    else:
        yield path, value


def differences(got, want, atol: float, rtol: float, rows: Tensor | None = None) -> list[str]:
    """One sentence per leaf of ``want`` that ``got`` does not match.

    rows: [B, S] mask; tensors [B, S, ...] are compared only where it is 1.
    """
    found = dict(leaves(got))
    problems = []
    for path, expected in leaves(want):
        value = found.get(path, "missing")
        if not isinstance(expected, Tensor):
            if isinstance(value, Tensor) or value != expected:
                problems.append(f"{path} is {value!r}; recorded {expected!r}")
        elif not isinstance(value, Tensor):
            problems.append(f"{path} is {value!r}; recorded a tensor {list(expected.shape)}")
        elif value.shape != expected.shape or value.dtype != expected.dtype:
            problems.append(
                f"{path} is {value.dtype} {list(value.shape)}; recorded {expected.dtype} {list(expected.shape)}"
            )
        else:
            value, expected = value.detach().double(), expected.double()
            if rows is not None and expected.dim() >= 2 and expected.shape[:2] == rows.shape:
                value, expected = value[rows.bool()], expected[rows.bool()]
            if not torch.isclose(value, expected, atol=atol, rtol=rtol, equal_nan=True).all():
                problems.append(f"{path} is off by up to {float((value - expected).abs().max()):.3g}")
    return problems
