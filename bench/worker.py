"""One side of ``bench.compare``: holds a call ready and times it whenever the parent asks. Needs no other bench file.

usage: worker.py PACKAGE_FOLDER CASES_FILE    (then a case number per line on stdin; seconds come back)
"""

import sys
import time

import torch


def _no_grad(function, arguments):
    def call():
        with torch.no_grad():
            return function(**arguments)

    return call


def main() -> None:
    folder, path = sys.argv[1:]
    sys.path.insert(0, folder)
    import internvl_kernels

    if not internvl_kernels.__file__.startswith(folder):
        sys.exit(f"internvl_kernels came from {internvl_kernels.__file__}, not from {folder}")
    calls = []
    for case in torch.load(path, weights_only=True):
        function = getattr(internvl_kernels, case["function"])
        arguments = case["arguments"]
        if case["direction"] == "forward":
            calls.append(_no_grad(function, arguments))
            continue
        leaves = [value.requires_grad_() for name, value in arguments.items() if name in case["leaves"]]
        outputs = function(**arguments)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        grads = [torch.ones_like(t) for t in outputs]
        calls.append(lambda o=outputs, x=leaves, g=grads: torch.autograd.grad(o, x, g, retain_graph=True))
    print("ready", flush=True)
    for text in sys.stdin:
        start = time.perf_counter()
        calls[int(text)]()
        print(time.perf_counter() - start, flush=True)


main()
