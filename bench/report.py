"""``python -m bench.report results.json ...``: plots and a Markdown page from result files."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from . import results, targets

OURS, PEER, MUTED = "#1f5fa8", "#c2703d", "#8a8f98"
PEER_COLOURS = {
    "sdpa": "#c2703d",
    "eager": "#8a8f98",
    "flex": "#5b8f4e",
    "unfused": "#8a8f98",
    "sdpa-packed": "#d9a441",
    "flash-causal": "#c2703d",
    "cudnn-causal": "#7a5195",
    "sdpa-efficient": "#d9a441",
    "sdpa-cudnn": "#a05d7a",
    "hf": "#7a5195",
    "eager-causal": "#5f6368",
}


def label(row: dict) -> str:
    """A row's name on a plot or in a table."""
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[row["dtype"]]
    direction = "" if row["direction"] == "forward" else f"{row['direction']}, "
    name = "clip + QK norm, " if row["op"] == "clip_qk_layernorm" else ""
    backend = "" if row["backend"] == "cpu" else f", {row['backend']}"
    return f"{name}{row['case']}, {direction}{short}{backend}"


def _kind(row: dict) -> str:
    """Which of the plots of a kind shows a row: the operators, the shapes of real models, or whole models."""
    if row["op"] == "model":
        return "models"
    operators = row["op"] == "clip_qk_layernorm" or row["case"].startswith(("alibi-", "grouped-", "multi-query-"))
    return "operators" if operators else "shapes"


def _axes(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_ratios(data: dict, path: Path, kind: str = "operators") -> bool:
    """How many times faster than each peer: one group of bars per case, logarithmic."""
    rows = [r for r in data["rows"] if "study" not in r and _kind(r) == kind]
    rows = [r for r in rows if any("ratio" in p for p in r["peers"].values())]
    if not rows:
        return False
    peers = dict.fromkeys(name for r in rows for name, found in r["peers"].items() if "ratio" in found)
    peers = sorted(peers, key=[*PEER_COLOURS, *peers].index)
    figure, axes = _axes(9.5, 1.2 + 0.42 * len(rows))
    height = 0.8 / len(peers)
    for k, name in enumerate(peers):
        places = [
            (i + (k - (len(peers) - 1) / 2) * height, r)
            for i, r in enumerate(rows)
            if "ratio" in r["peers"].get(name, {})
        ]
        values = [r["peers"][name]["ratio"] for _, r in places]
        bars = axes.barh(
            [y for y, _ in places],
            [v - 1 for v in values],
            height * 0.92,
            left=1,
            color=PEER_COLOURS.get(name, MUTED),
            label=f"over {name}",
        )
        axes.bar_label(bars, [f"{v:.1f}" for v in values], fontsize=7, padding=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [label(r) for r in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter(lambda value, _: f"{value:g}x" if value in (0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500) else "")
    axes.set_xlabel("speed-up over what a user would pick instead (right of 1x: ours is faster)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(peers), frameon=False, fontsize=8)
    return _save(figure, path)


def plot_ceiling(data: dict, path: Path, kind: str = "operators") -> bool:
    """Share of the machine's own ceiling, measured in the same rounds."""
    rows = [r for r in data["rows"] if "study" not in r and _kind(r) == kind and "share_of_ceiling" in r["ours"]]
    if not rows:
        return False
    figure, axes = _axes(9.5, 1.0 + 0.28 * len(rows))
    shares = [r["ours"]["share_of_ceiling"] for r in rows]
    names = [f"{label(r)}  [{r['ceiling']['name']}]" for r in rows]
    bars = axes.barh(
        range(len(rows)), shares, 0.7, color=[OURS if "matmul" in r["ceiling"]["name"] else PEER for r in rows]
    )
    axes.bar_label(bars, [f"{s:.0%}" for s in shares], fontsize=7, padding=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("share of torch.mm at the same FLOPs, or of reading or copying the same bytes")
    return _save(figure, path)


def plot_growth(data: dict, path: Path) -> bool:
    """Time per visible pair and peak memory from short to long, with and without distance pruning."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    studies = {"growth": ("every visible tile", OURS, "o"), "growth pruned": ("ALiBi distance pruning", PEER, "s")}
    anchored = [r for r in data["rows"] if results.ANCHOR in r["peers"]]
    rows = {
        name: sorted((r for r in anchored if r.get("study") == name), key=lambda r: r["shape"][1]) for name in studies
    }
    if not rows["growth"]:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, (text, colour, marker) in studies.items():
        lengths = [r["shape"][1] for r in rows[name]]
        per_pair = [1 / r["peers"][results.ANCHOR]["ratio"] for r in rows[name]]
        left.plot(lengths, per_pair, marker=marker, color=colour, label=text)
        with_memory = [r for r in rows[name] if r["ours"].get("peak_mib") is not None]
        right.plot(
            [r["shape"][1] for r in with_memory],
            [max(r["ours"]["peak_mib"], 0.1) for r in with_memory],
            marker=marker,
            color=colour,
            label=text,
        )
    lengths = [r["shape"][1] for r in rows["growth"]]
    heads = rows["growth"][0]["shape"][3]
    right.plot(
        lengths, [heads * s * s * 4 / 2**20 for s in lengths], "--", color=MUTED, label="a dense fp32 bias (computed)"
    )
    left.set_ylabel("time per visible pair, 4k keys = 1")
    right.set_ylabel("peak memory of a call, MiB")
    right.set_yscale("log")
    left.set_ylim(bottom=0)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{s // 1024}k" if s >= 1024 else str(s) for s in lengths])
        axes.set_xlabel("keys")
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _save(figure, path: Path) -> bool:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


PLOTS = {
    "ratios": plot_ratios,
    "ratios-shapes": functools.partial(plot_ratios, kind="shapes"),
    "ratios-models": functools.partial(plot_ratios, kind="models"),
    "ceiling": plot_ceiling,
    "ceiling-shapes": functools.partial(plot_ceiling, kind="shapes"),
    "growth": plot_growth,
}


def table(data: dict) -> list[str]:
    """Every row as a Markdown table."""
    lines = [
        "| case | ms | spread | GFLOP/s | GB/s | of its ceiling | over peers | peak MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in data["rows"]:
        own = row["ours"]
        name = (f"{row['study']}: " if "study" in row else "") + label(row)
        peers = [
            f"{peer} {found['ratio']:.2f}x"
            + (" per pair" if found.get("per_pair") else "")
            + (f" (attention {found['attention_ratio']:.1f}x)" if "attention_ratio" in found else "")
            if "ratio" in found
            else f"{peer}: {found['skipped']}"
            for peer, found in row["peers"].items()
        ]
        share = f"{own['share_of_ceiling']:.2f} {row['ceiling']['name']}" if "share_of_ceiling" in own else ""
        if "attention" in own:
            share = "attention {share:.0%} of it, {share_predicted:.0%} by the operator alone".format(
                **own["attention"]
            )
        cells = [
            name,
            f"{own['median_ms']:.3f}",
            f"{own['spread']:.0%}",
            f"{own['gflops']:.0f}" if "gflops" in own else "",
            f"{own['gbytes']:.1f}" if "gbytes" in own else "",
            share,
            ", ".join(peers),
            "" if own.get("peak_mib") is None else f"{own['peak_mib']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def target_table(verdicts: list[dict]) -> list[str]:
    """The verdicts as a Markdown table."""
    lines = ["| where | what | over | target | found | verdict |", "| --- | --- | --- | ---: | ---: | --- |"]
    for v in verdicts:
        found = f"{v['value']:.2f} ({v['case']})" if "value" in v else ""
        lines.append(
            f"| {v['where']} | {v['what']} | {v['than']} | {v['relation']} {v['bound']:g} | {found} | {v['verdict']} |"
        )
    return lines


def page(data: dict, plots: list[str]) -> str:
    """The Markdown page of one result file."""
    device = "cuda" if "gpu" in data["machine"] else "cpu"
    ceilings = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in data["ceilings"].items())
    parts = [f"# Measurements: {results.describe(data)}", "", f"Ceilings of the same run: {ceilings}.", ""]
    parts += [
        "Medians of interleaved rounds behind a correctness gate; FLOPs count visible pairs only; spread is the",
        "interquartile range over the median. Ratios are times of the peer over ours. Where rows were measured at",
        "several revisions, the result file says which row at which.",
        "",
    ]
    parts += [f"![{name}]({name})" for name in plots]
    parts += [
        "",
        "## Targets",
        "",
        *target_table(targets.judge(data["rows"], device)),
        "",
        "## Rows",
        "",
        *table(data),
        "",
        *_remarks(data),
    ]
    return "\n".join(parts)


def _remarks(data: dict) -> list[str]:
    """What bench.device found beside its rows: the verdicts of its tests, and what it did not measure."""
    tests = [
        f"- tests on {name}: {found['verdict']} {found['counts']}" for name, found in data.get("tests", {}).items()
    ]
    failed = [f"- {row['entry']}: {(row['error'].splitlines() or [''])[0][:300]}" for row in data.get("failed", [])]
    left_out = [f"- {name}: out of time" for name in data.get("left_out", [])]
    found = [*tests, *failed, *left_out]
    return ["## Beside the rows", "", *found, ""] if found else []


def write(path: Path, folder: Path) -> list[Path]:
    """Plots and page of one result file; returns what was written."""
    data = results.load(path)
    plots = [
        f"{path.stem}-{name}.png" for name, plot in PLOTS.items() if plot(data, folder / f"{path.stem}-{name}.png")
    ]
    target = folder / f"{path.stem}.md"
    target.write_text(page(data, plots))
    return [target, *(folder / name for name in plots)]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    p.add_argument("results", nargs="+", type=Path, help="files that bench.run, `make bench` or bench.device wrote")
    p.add_argument("--out", type=Path, help="folder of the pages and plots (default: beside each file)")
    args = p.parse_args(argv)
    try:
        for path in args.results:
            folder = args.out or path.parent
            folder.mkdir(parents=True, exist_ok=True)
            for written in write(path, folder):
                print(f"wrote {written}")
    except ValueError as error:
        p.error(str(error))
    except ModuleNotFoundError as error:
        p.error(f"{error}: plots need matplotlib (pip install matplotlib)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
