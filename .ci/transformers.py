"""Runs the model tests under other versions of transformers: one process each, this tree and this torch.

usage: python .ci/transformers.py [--quick] [VERSION...]    default: every version below

A version is installed once, beside the environment, into build/transformers-VERSION/. --quick: a part of the tests
that meets every family, mask form and kind of cache.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What each release needs in versions that the environment may not have; all else comes from there.
VERSIONS = {
    "4.57.6": (
        "huggingface-hub==0.36.0 tokenizers==0.22.1 requests==2.34.2 urllib3==2.8.0 charset-normalizer==3.5.2 "
        "certifi==2026.10.19.post1"
    ),
    "5.17.0": "huggingface-hub==1.9.0 httpx==0.28.1 httpcore==1.0.9 certifi==2026.10.19.post1 sniffio==1.3.1",
}
QUICK = "golden or family or equals_encoding or logits_equal or every_bit or generate_equals"


def install(version: str) -> Path:
    """The folder that holds a version."""
    folder = ROOT / "build" / f"transformers-{version}"
    done = folder / ".complete"
    pins = [f"transformers=={version}", *VERSIONS[version].split()]
    if not done.exists() or done.read_text().split() != pins:
        print("installing", *pins, "into", folder.relative_to(ROOT), flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.check_call([*command, "--upgrade", "--target", str(folder), *pins])
        done.write_text("\n".join(pins))
    return folder


def tests() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_models_*.py"))


def run(version: str, quick: bool, arguments: list[str]) -> int:
    path = [str(install(version)), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in path if p)}
    code = f"import transformers; assert transformers.__version__ == {version!r}, transformers.__file__"
    subprocess.check_call([sys.executable, "-c", code], env=environment, cwd=ROOT)
    selection = ["-m", "not slow", *(["-k", QUICK] if quick else [])]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection, *arguments, *tests()]
    print(f"transformers {version}", flush=True)
    return subprocess.call(command, env=environment, cwd=ROOT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a part of the tests")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(VERSIONS)}; default: all")
    options, arguments = parser.parse_known_args()
    unknown = set(options.versions) - set(VERSIONS)
    if unknown:
        parser.error(f"unknown version {', '.join(sorted(unknown))}; known: {', '.join(VERSIONS)}")
    if not importlib.util.find_spec("pip"):
        sys.exit("pip is missing: python -m ensurepip")
    failed = [v for v in options.versions or VERSIONS if run(v, options.quick, arguments) != 0]
    if failed:
        print(f"failed under transformers {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
