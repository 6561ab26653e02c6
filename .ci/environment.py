"""The environment that `make` works in: create it, install what is missing in it, make this tree importable from it.

usage: python .ci/environment.py create DIR
       python .ci/environment.py install GROUP...    GROUP: build, run, or an extra of pyproject.toml
       python .ci/environment.py link

What is installed and within the ranges of pyproject.toml stays; the rest comes in the versions of constraints.txt.
An installed torch is never replaced. Nothing here imports torch, so that a run with nothing to do takes a moment.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def create(folder):
    """A virtual environment; it sees the system's packages when torch is one of them, so that this torch is kept."""
    if sys.version_info < (3, 10):  # noqa: UP036 (run by whatever python3 is)
        sys.exit(f"Python {sys.version.split()[0]} is too old: 3.10 or newer is needed (make PYTHON=python3.11 ...)")
    inherit = ["--system-site-packages"] if importlib.util.find_spec("torch") else []
    if subprocess.call([sys.executable, "-m", "venv", *inherit, folder]) != 0:
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(f"{sys.executable} -m venv failed; on Debian and Ubuntu: apt install python3-venv")


def install(groups):
    """Install the missing requirements of the groups: torch first, because it may bring its own triton."""
    if not importlib.util.find_spec("pip"):  # environments made by uv have none
        subprocess.check_call([sys.executable, "-m", "ensurepip"])
    torch_pin = missing([group for group in groups if group in ("build", "run")], only="torch")
    if torch_pin:
        pip_install(torch_pin)
    pins = missing(groups)
    if pins:
        pip_install(pins, keep=["torch"])


def missing(groups, only=None):
    """Pinned requirements of the groups that are not installed in an acceptable version."""
    from pip._vendor.packaging.requirements import Requirement  # pip's own copy: a fresh environment has no other

    project = read_toml(ROOT / "pyproject.toml")
    tables = {
        "build": project["build-system"]["requires"],
        "run": project["project"]["dependencies"],
        **project["project"]["optional-dependencies"],
    }
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate():
                pins[pin.name] = f"{pin.name}{pin.specifier}"
    found = []
    for requirement in (Requirement(line) for group in groups for line in tables[group]):
        name = requirement.name
        if (only and name != only) or (requirement.marker and not requirement.marker.evaluate()):
            continue
        version = installed(name)
        if version is None:
            found.append(pins[name])
        elif not requirement.specifier.contains(version, prereleases=True):
            if name == "torch":
                sys.exit(f"torch {version} is installed, {requirement} is needed; an installed torch is not replaced")
            found.append(pins[name])
    return sorted(set(found))


def installed(name):
    """Version of an installed distribution, or None. A torch without metadata is a source build: recent enough."""
    from importlib import metadata  # here: create() runs on any Python 3, to say which one is needed

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "9999" if name == "torch" and importlib.util.find_spec("torch") else None


def read_toml(path):
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    return tomllib.loads(path.read_text())


def pip_install(pins, keep=()):
    print("installing", *pins, flush=True)
    kept = [f"{name}=={installed(name)}" for name in keep if installed(name) not in (None, "9999")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins, *kept]
    if subprocess.call(command) != 0:
        sys.exit(1)  # pip has said why


def link():
    """Put python/ on this environment's import path."""
    site = Path(sysconfig.get_path("purelib"))
    if (site / "internvl_kernels").is_dir():
        print("note: an installed internvl-kernels hides this tree outside of make (pip uninstall internvl-kernels)")
    (site / "internvl-kernels-tree.pth").write_text(f"{ROOT / 'python'}\n")


def main(arguments):
    verbs = {"create": lambda rest: create(*rest), "install": install, "link": lambda rest: link(*rest)}
    if not arguments or arguments[0] not in verbs:
        sys.exit(__doc__)
    verbs[arguments[0]](arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
