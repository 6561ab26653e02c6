"""Which measurements make up a run: ``core`` fits a quarter of an hour on two cores, ``full`` is everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import cases, measure, models

CPU_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Entry:
    """One row of a run: ``prepare()`` gates and builds it. ``study`` names the comparison over rows it belongs to."""

    name: str
    prepare: Callable[[], measure.Measurement]
    core: bool = True
    rounds: int = measure.ROUNDS
    study: str | None = None
    memory: bool = False


def _attention(model: str, seqlen: int, dtype: str = "float32", direction: str = "forward", **options) -> Entry:
    entry = {name: options.pop(name) for name in ("core", "rounds", "study", "memory") if name in options}
    call = {"peers": options.pop("peers", ("sdpa", "eager")), "backend": options.pop("backend", "cpu")}
    case = cases.make(model, seqlen, dtype=dtype, **options)
    name = f"{direction} {case.name} {dtype}{_on(call['backend'])}"
    return Entry(name, lambda: measure.attention(case, direction=direction, **call), **entry)


def _norm(model: str, rows: int, dtype: str, direction: str, backend: str = "cpu", **entry) -> Entry:
    case = cases.make_norm(model, rows, dtype)
    prepare = lambda: measure.norm(case, direction=direction, backend=backend)  # noqa: E731
    return Entry(f"norm {direction} {case.name} {dtype}{_on(backend)}", prepare, **entry)


def _on(backend: str) -> str:
    return "" if backend == "cpu" else f" on {backend}"  # several of them measure the same on a GPU


def cpu_entries() -> Iterator[Entry]:
    """Every CPU measurement, in the order in which it is run."""
    everyone = ("sdpa", "eager", "flex")
    for dtype in CPU_DTYPES:
        for dim in (64, 128):
            yield _attention(f"alibi-d{dim}", 2048, dtype, peers=everyone, memory=dtype == "float32")
        yield _attention("alibi-d128", 512, dtype)
    for dtype in CPU_DTYPES:  # SDPA's bf16 backward takes minutes on processors without bf16 instructions
        for dim in (64, 128):
            peers = ("sdpa", "eager") if dtype == "float32" else ("eager",)
            yield _attention(f"alibi-d{dim}", 1024, dtype, "backward", peers=peers, memory=dtype == "float32")
    for dtype in CPU_DTYPES:
        yield _attention("alibi-d128", 32768, dtype, mask="decode")
        yield _attention("grouped-d128", 32768, dtype, mask="decode")
        yield _attention("multi-query-d128", 32768, dtype, mask="decode", peers=("sdpa", "eager", "sdpa-packed"))
        yield _attention("alibi-d128", 4096, dtype, mask="decode", batch=4)
    for direction in ("forward", "backward"):
        for dtype in CPU_DTYPES:
            yield _norm("mpt-1b", 2048, dtype, direction, rounds=15)
            yield _norm("mpt-7b", 2048, dtype, direction, core=False, rounds=15)
            yield _norm("multi-query-2048", 2048, dtype, direction, core=False, rounds=15)
    yield Entry(
        "pruning alibi-d64 S8192", lambda: measure.pruning(cases.make("alibi-d64", 8192)), rounds=2, study="pruning"
    )
    for dim in (64, 80, 96, 112, 128):
        yield _attention(f"alibi-d{dim}", 1536, peers=(), study="head dims")
    anchor = cases.make("alibi-d64", 4096)
    for seqlen in (512, 1024, 2048, 4096, 8192, 16384, 32768):
        core = 1024 <= seqlen <= 16384
        rounds = 15 if seqlen <= 1024 else 7 if seqlen <= 4096 else 3
        for study in ("growth", "growth pruned"):
            case = cases.make("alibi-d64", seqlen)
            yield Entry(
                f"{study} S{seqlen}",
                lambda case=case, study=study: measure.growth(case, anchor, pruned=study == "growth pruned"),
                core=core and (study == "growth" or seqlen <= 8192),
                rounds=rounds,
                study=study,
                memory=True,
            )
    yield from _shape_entries()
    yield from _model_entries()


def _model_entries() -> Iterator[Entry]:
    """Whole models of one layer: prefill, a training step, and 32 tokens after a long prompt."""
    for family, described in models.FAMILIES.items():
        for mode in described.modes:
            for dtype in CPU_DTYPES:
                case = models.ModelCase(family, mode, dtype)
                core = dtype == "float32" and (family in ("mpt", "llama") or family + mode == "prefix-gpt2train")
                prepare = lambda case=case: models.model(case)  # noqa: E731
                rounds = 3 if core else {"float32": 2, "bfloat16": 1}[dtype]  # a bf16 row takes about half a minute
                yield Entry(f"{case.name} {mode} {dtype}", prepare, core, rounds=rounds, memory=True)


def _shape_entries() -> Iterator[Entry]:
    """Shapes of real models: one in the core, the others in the full run."""
    for model in ("mpt-7b", "mpt-30b", "llava-7b", "llava-13b", "bloom-7b1", "paligemma"):
        for mask in ("prefix", "padded", "packed"):
            for seqlen in (1024, 2048, 4096):
                core = seqlen == 1024 and mask == "prefix" and model in ("mpt-7b", "mpt-30b", "paligemma")
                batch = 2 if mask == "padded" else 1
                yield _attention(model, seqlen, mask=mask, batch=batch, core=core, rounds=3)
    for prefix in (0, "1/2", "1/1"):
        yield _attention("alibi-d128", 2048, prefix=prefix, core=False)
    yield _attention("qllama", 1025, mask="cross", core=True, batch=4)
    yield _attention("qllama", 512, core=False, batch=2)
    for batch in (1, 8, 32):
        yield _attention("mpt-7b", 4096, mask="decode", batch=batch, core=False)


GPU_PEERS = ("flex", "flash-causal", "cudnn-causal", "sdpa-efficient", "sdpa-cudnn", "flash-attn", "xformers")


def gpu_entries(backends: tuple[str, ...]) -> Iterator[Entry]:
    """Every GPU measurement, the most telling first: a run that is cut short has them."""
    big = {"rounds": 15, "batch": 4}
    for direction in ("forward", "backward"):
        for dim in (128, 64):
            for backend in backends:
                yield _attention(
                    f"alibi-d{dim}", 4096, "bfloat16", direction, backend=backend, peers=GPU_PEERS, memory=True, **big
                )
    for model, batch in (("mpt-7b", 32), ("grouped-d128", 32), ("multi-query-d128", 32), ("mpt-7b", 1)):
        for backend in backends:
            yield _attention(model, 4096, "bfloat16", mask="decode", batch=batch, backend=backend, rounds=15)
    for direction in ("forward", "backward"):
        for backend in backends:
            yield _norm("mpt-7b", 16384, "bfloat16", direction, backend, rounds=15)
    pruned = cases.make("alibi-d128", 8192, dtype="bfloat16")
    for backend in backends:
        yield Entry(
            f"pruning {backend} {pruned.name}",
            lambda backend=backend: measure.pruning(pruned, backend=backend),
            study="pruning",
        )
    few = {"peers": ("flex", "flash-causal")}
    for seqlen in (1024, 2048, 8192, 16384):
        for backend in backends:
            yield _attention("alibi-d128", seqlen, "bfloat16", batch=16384 // seqlen, backend=backend, **few)
    for model in ("mpt-30b", "paligemma", "llava-7b"):
        for backend in backends:
            yield _attention(model, 4096, "bfloat16", backend=backend, batch=2, **few)
    for backend in backends:
        yield _attention("llava-7b", 4096, "bfloat16", mask="packed", backend=backend, peers=("flex",))
    for backend in backends:
        yield _attention("alibi-d128", 2048, "float16", backend=backend, batch=4, **few)
    if "triton" in backends:
        yield _attention("alibi-d64", 2048, "float32", backend="triton", peers=("flex", "sdpa-efficient"), batch=4)
