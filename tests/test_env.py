"""The environment report and the list of variables, here, in the README and in the sources."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import internvl_kernels
import pytest
import torch
from internvl_kernels import backends, registration, variables

ROOT = Path(__file__).parent.parent


def report(*arguments, **environment):
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "internvl_kernels.env", *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_json_report():
    """Everything a bug report needs, as one JSON object and nothing else."""
    info = json.loads(report("--json", INTERNVL_BACKEND="reference"))
    assert info["internvl_kernels"] == internvl_kernels.__version__
    assert info["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(info["backends"]) == set(backends.BACKENDS)
    assert info["variables"].keys() == variables.VARIABLES.keys()
    assert info["variables"]["INTERNVL_BACKEND"] == "reference"
    for name, row in info["backends"].items():
        assert row["reasons"] == backends.BACKENDS[name].here()


@pytest.mark.skipif(bool(registration.LIBRARY_ERROR), reason=str(registration.LIBRARY_ERROR))
def test_json_report_of_the_build():
    cpu = registration.cpu_info()
    for isa in cpu["supported"]:
        info = json.loads(report("--json", INTERNVL_CPU_ISA=isa))
        assert info["cpu"]["isa"] == isa and info["variables"]["INTERNVL_CPU_ISA"] == isa
        assert info["cpu"]["compiled"] == cpu["compiled"] == info["build"]["cpu_isas"].split(",")
        assert info["build"]["version"] == internvl_kernels.__version__
        assert not info["library_error"] and Path(info["library"]).is_file()
        assert not info["backends"]["cpu"]["reasons"]


def test_text_report():
    text = report()
    assert text.startswith(f"internvl_kernels {internvl_kernels.__version__}")
    for name in (*backends.BACKENDS, *variables.VARIABLES, torch.__version__):
        assert name in text, name
    assert len([line for line in text.splitlines() if line.endswith("runs here")]) >= 1


def test_a_wrong_instruction_set_is_reported_not_fatal():
    """``env`` is what people run when something is wrong: it must not fail on it."""
    text = report(INTERNVL_CPU_ISA="sse9")
    assert "INTERNVL_CPU_ISA is 'sse9'" in text


def test_default_backend(monkeypatch):
    monkeypatch.delenv("INTERNVL_BACKEND", raising=False)
    assert variables.default_backend() is None
    monkeypatch.setenv("INTERNVL_BACKEND", "")
    assert variables.default_backend() is None
    monkeypatch.setenv("INTERNVL_BACKEND", "reference")
    assert variables.default_backend() == "reference"
    x = torch.zeros(1, 2, 1, 8, dtype=torch.float64)  # only the reference takes float64
    assert internvl_kernels.prefix_attention(x, x, x).dtype == torch.float64


def test_readme_table_equals_the_list():
    readme = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(INTERNVL_\w+)` \| (.*) \|$", readme, re.MULTILINE))
    assert rows == variables.VARIABLES


def variables_in_the_sources():
    """Every environment variable that Python, C++, CMake, make or setup.py asks for."""
    patterns = {
        "*.py": r"environ(?:\.get\(|\[|\.pop\()\s*[\"'](INTERNVL_\w+)|getenv\([\"'](INTERNVL_\w+)",
        "*.cpp": r"getenv\(\"(INTERNVL_\w+)",
        "*.h": r"getenv\(\"(INTERNVL_\w+)",
        "*.cu*": r"getenv\(\"(INTERNVL_\w+)",
        "CMakeLists.txt": r"internvl_setting\((INTERNVL_\w+)|ENV\{(INTERNVL_\w+)\}",
        "Makefile": r"\$\((INTERNVL_\w+)\)",
    }
    found = {}
    for folder in ("python", "csrc", "triton_kernels", "bench", "examples", "."):
        for glob, pattern in patterns.items():
            files = (ROOT / folder).glob(glob) if folder == "." else (ROOT / folder).rglob(glob)
            for file in files:
                for names in re.findall(pattern, file.read_text()):
                    found |= dict.fromkeys(filter(None, names if isinstance(names, tuple) else (names,)), file)
    return found


def test_every_variable_is_listed():
    found = variables_in_the_sources()
    assert {"INTERNVL_CPU_ISA", "INTERNVL_BACKEND", "INTERNVL_CUDA", "INTERNVL_HEAD_DIMS"} <= found.keys()
    assert found.keys() == variables.VARIABLES.keys(), found


def test_python_reads_variables_in_one_place():
    for file in (ROOT / "python").rglob("*.py"):
        if file.name != "variables.py":
            assert not re.search(r"environ|getenv", file.read_text()), file


def test_compiled_instruction_sets_are_named():
    """The variable's description lists what the build table holds."""
    for isa in registration.cpu_info().get("compiled", []):
        assert isa in variables.VARIABLES["INTERNVL_CPU_ISA"]
