"""Result files: one JSON per run, with what the machine is, what its ceilings are, and one row per measurement.

Rows are written as they come, so that an interrupted run keeps what it measured.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
from internvl_kernels import registration

FORMAT = 1
FOLDER = Path(__file__).parent / "results"
ANCHOR = "anchor"  # the peer of rows about growth: ourselves at one length, timed in the same rounds


def machine(device: str = "cpu") -> dict:
    """What the figures were measured on, as plain JSON values."""
    info = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_isa": registration.cpu_info().get("isa"),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        info |= {"gpu_gib": round(properties.total_memory / 2**30), "cuda": torch.version.cuda}
    return info


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def revision() -> str | None:
    """Commit of this tree, "+" behind it when something is changed; None outside git."""
    try:
        command = ["git", "-C", str(FOLDER.parent), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class ResultFile:
    """Collects rows and keeps ``path`` up to date. ``path`` None keeps them in memory only.

    ``update`` goes on from what ``path`` holds: rows keep the revision they were measured at, and a row measured again
    takes the place of the old one. Raises ValueError when the old rows are of another machine.
    """

    def __init__(self, path: Path | None, device: str = "cpu", *, update: bool = False) -> None:
        self.path = path
        self.data = {
            "format": FORMAT,
            "date": datetime.date.today().isoformat(),
            "revision": revision(),
            "machine": machine(device),
            "ceilings": {},
            "rows": [],
        }
        if update and path is not None and path.exists():
            old = load(path)
            if old["machine"] != self.data["machine"]:
                raise ValueError(f"{path} was measured on {describe(old)}; this is {describe(self.data)}")
            self.data["rows"] = old["rows"]

    @property
    def rows(self) -> list[dict]:
        """The rows so far."""
        return self.data["rows"]

    def add(self, row: dict, name: str, study: str | None = None) -> None:
        """Adds the row of the plan's entry ``name``, in the place of an older one, and writes the file."""
        row |= {"entry": name, "revision": self.data["revision"]}
        if study:
            row["study"] = study
        kept = [other for other in self.rows if other.get("entry") != name]
        self.data["rows"] = [*kept, row]
        self.write()

    def sort(self, names: Iterable[str]) -> None:
        """Puts the rows in the order of ``names``; rows that no entry has any more go."""
        order = {name: index for index, name in enumerate(names)}
        self.data["rows"] = sorted(
            (row for row in self.rows if row.get("entry") in order), key=lambda row: order[row["entry"]]
        )

    def write(self) -> None:
        """Writes everything; a crash in between leaves the old file."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.replace(self.path)


def default_path(device: str = "cpu") -> Path:
    """``bench/results/<processor or GPU>-<date>.json``."""
    info = machine(device)
    name = re.sub(r"[^a-z0-9]+", "-", info.get("gpu", f"{info['processor']} {info['cpu_isa']}").lower()).strip("-")
    return FOLDER / f"{name}-{datetime.date.today().isoformat()}.json"


def load(path: Path | str) -> dict:
    """A result file. Raises ValueError when it is none of this format."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is no result file of format {FORMAT}; bench.run and `make bench` write them")
    return data


def describe(data: dict) -> str:
    """One line: machine, date, revision."""
    info = data["machine"]
    name = info.get("gpu") or f"{info['processor']} ({info['cpu_isa']}, {info['threads']} threads)"
    revisions = dict.fromkeys(row.get("revision", data["revision"]) for row in data["rows"]) or [data["revision"]]
    return f"{name}, torch {info['torch']}, {data['date']}, revision {', '.join(map(str, revisions))}"
