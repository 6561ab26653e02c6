"""The plan under pytest-benchmark: ours timed by the plugin, peers and ceiling in the setup of each of its rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import plan, results, roofline, targets, timing
from .run import line

OUT = Path(__file__).parent.parent / "build" / "bench"
FILE = pytest.StashKey[results.ResultFile]()


def pytest_addoption(parser) -> None:
    parser.addoption("--bench-out", type=Path, help="result file (default: build/bench/<machine>-<date>.json)")


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "full: measured by `make bench-full` only")


@pytest.fixture(scope="session")
def result_file(pytestconfig) -> results.ResultFile:
    """Rows of this session, on disk after every measurement; the ceilings are measured first."""
    path = pytestconfig.getoption("--bench-out") or OUT / results.default_path().name
    file = results.ResultFile(path)
    file.data["ceilings"] = roofline.ceilings()
    pytestconfig.stash[FILE] = file
    return file


@pytest.fixture
def measured(benchmark, result_file):
    """``measured(entry)``: gate, time, record. One round is one call of everyone, in turn."""

    def run(entry: plan.Entry) -> dict:
        measurement = entry.prepare()
        benchmark.group = entry.study or measurement.facts.get("group") or entry.name
        benchmark.pedantic(measurement.ours, setup=measurement.others.round, rounds=entry.rounds, warmup_rounds=1)
        row = measurement.row(timing.summarise(benchmark.stats.stats.data), memory=entry.memory)
        result_file.add(row, entry.name, entry.study)
        benchmark.extra_info.update(row)
        return row

    return run


def entries(select) -> list:
    """Parameters of the entries that ``select(name)`` wants; those beyond the core carry the marker ``full``."""
    chosen = [entry for entry in plan.cpu_entries() if select(entry.name)]
    return [
        pytest.param(entry, id=entry.name.replace(" ", "-"), marks=[] if entry.core else pytest.mark.full)
        for entry in chosen
    ]


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter, config) -> None:
    file = config.stash.get(FILE, None)
    if file is None or not file.rows:
        return
    file.data["targets"] = targets.judge(file.rows)
    file.write()
    write = terminalreporter.write_line
    write("")
    write(f"{results.describe(file.data)}; medians of interleaved rounds")
    write("ceilings  " + "  ".join(f"{name} {value:.1f}" for name, value in file.data["ceilings"].items()))
    for row in file.rows:
        write(line(row))
    write("")
    write("targets: ratios within this run, the worst case of each")
    for text in targets.table(file.data["targets"]):
        write(text)
    write(f"wrote {file.path}; plots and a page: python -m bench.report {file.path}")
