"""The 16-lane kernels on processors without AVX-512: the same sources lowered to AVX2 by a build of their own.

VDPBF16PS is then lowered too, to the two FMAs and the flushes to zero that its documentation states.
"""

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
CPU = registration.cpu_info()
WIDE = [isa for isa in CPU.get("compiled", []) if isa.startswith("avx512")]
pytestmark = pytest.mark.skipif(not WIDE, reason="AVX2 and AVX-512 exist on x86-64 only")


def test_bf16_products_use_the_instruction():
    """The real build, which this processor may be unable to run, holds the instruction the kernels are there for."""
    if "avx512_bf16" not in WIDE or platform.machine() != "x86_64":
        pytest.skip("this compiler does not know AVX-512 BF16")
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    done = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", registration.library_path()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    inside = [block for block in done.stdout.split("\n\n") if "vdpbf16ps" in block]
    assert inside and all("avx512_bf16" in block.splitlines()[0] for block in inside)
    products = max(block.count("vdpbf16ps") for block in inside)
    assert products >= 24  # a micro-kernel of 12 rows and 2 vectors


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """PYTHONPATH of a package whose 16-lane kernels are compiled for AVX2."""
    folder = tmp_path_factory.mktemp("lowered")
    package = folder / "python" / "internvl_kernels"
    shutil.copytree(Path(internvl_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("*.so"))
    settings = [f"-DPython_EXECUTABLE={sys.executable}", "-DINTERNVL_CUDA=0", "-DINTERNVL_AVX512_ON_AVX2=ON"]
    configure = ["cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja", f"-DINTERNVL_OUTPUT_DIR={package}"]
    for command in ([*configure, *settings], ["cmake", "--build", folder / "build"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return str(package.parent)


SAME_BITS = """
import torch
from internvl_kernels.testing import Case, build, run
operator = torch.ops.internvl.prefix_attn
for shape in ((150, 150), (5, 3000)):
    inputs = build(Case(2, *shape, 8, 2, 40, "bfloat16", alibi="mpt", prefix_len=(30, 150)))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(operator, inputs))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)), name
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", WIDE)
def test_sixteen_lanes_lowered(lowered, isa):
    environment = {**os.environ, "INTERNVL_CPU_ISA": isa, "PYTHONPATH": lowered}
    for script, arguments in ((SAME_BITS, []), (SWEEP, ["300"])):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["isa"] == isa
    assert not found["failures"], json.dumps(found["failures"], indent=2)
