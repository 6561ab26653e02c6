"""Lets pip build the extension: runs CMake, which holds every source and flag, and Ninja. Metadata: pyproject.toml."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"setuptools {setuptools.__version__} is too old for pyproject.toml: pip install 'setuptools>=77'")


class CMakeBuild(build_ext):
    """Leaves `_ops` and `_C` in the package: in the tree for an editable install, else in what becomes the wheel."""

    def run(self):
        in_place = self.inplace or self.editable_mode
        package = (ROOT / "python" if in_place else Path(self.build_lib).resolve()) / "internvl_kernels"
        # A folder of its own, and no setting (-U) of an earlier build: pip's isolated builds see another torch.
        build = ROOT / "build" / f"pip-{sysconfig.get_config_var('SOABI')}"
        configure = ["cmake", "-U", "INTERNVL_*", "-U", "*Python*", "-U", "pybind11_DIR", "-G", "Ninja"]
        configure += ["-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DINTERNVL_OUTPUT_DIR={package}"]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        # cmake and ninja of this environment also when it is not activated.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        for command in (configure, ["cmake", "--build", str(build)]):
            try:
                subprocess.run(command, check=True, env={**os.environ, "PATH": path})
            except FileNotFoundError:
                sys.exit("cmake is missing: pip install cmake ninja (or make, which does all of it)")
            except subprocess.CalledProcessError as error:
                sys.exit(f"internvl-kernels: cmake failed with status {error.returncode}; what it says above is why")

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


# The extension is named only so that the wheel is tagged for this Python and platform.
setup(ext_modules=[Extension("internvl_kernels._C", [])], cmdclass={"build_ext": CMakeBuild})
