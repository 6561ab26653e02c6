"""The portable kernels on Arm: cross-compiled and run under qemu, where both are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.mark.slow
@pytest.mark.skipif(not (COMPILER and EMULATOR), reason="needs g++-aarch64-linux-gnu and qemu-user")
def test_baseline_on_arm(tmp_path):
    flags = [
        "-O1",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-maybe-uninitialized",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-static",
    ]
    sources = [ROOT / "tests/arm_check.cpp", ROOT / "csrc/cpu/isa_baseline.cpp"]
    program = tmp_path / "arm_check"
    command = [COMPILER, *flags, "-I", ROOT / "csrc", *sources, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
