"""The 16-lane kernels on processors without AVX-512: the same sources lowered to AVX2 by a build of their own."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import internvl_kernels
import pytest
from internvl_kernels import registration
from test_prefix_attn import SWEEP

ROOT = Path(__file__).parents[1]
ISAS = registration.cpu_info().get("supported", [])


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 and AVX-512 exist on x86-64 only")
@pytest.mark.skipif("avx512" in ISAS, reason="this processor runs the AVX-512 kernels themselves (test_prefix_attn.py)")
def test_sixteen_lanes_without_avx512(tmp_path):
    package = tmp_path / "python" / "internvl_kernels"
    shutil.copytree(Path(internvl_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("*.so"))
    settings = [f"-DPython_EXECUTABLE={sys.executable}", "-DINTERNVL_CUDA=0", "-DINTERNVL_AVX512_ON_AVX2=ON"]
    configure = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", f"-DINTERNVL_OUTPUT_DIR={package}"]
    for command in ([*configure, *settings], ["cmake", "--build", tmp_path / "build"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    environment = {**os.environ, "INTERNVL_CPU_ISA": "avx512", "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, "300"], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["isa"] == "avx512"
    assert not found["failures"], json.dumps(found["failures"], indent=2)
