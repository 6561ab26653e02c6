"""The process that measures for ``bench.device``: an entry's name per line on stdin, its row as a line of JSON back.

usage: python -m bench.device_worker BACKEND...    ("ceilings" asks for those of the device)
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping

import torch

from . import plan, roofline


def answer(entries: Mapping[str, plan.Entry], request: str, device: str = "cuda") -> dict:
    """What was measured, or the error; "broken": the device answers no more, and a new process is needed."""
    try:
        if request == "ceilings":
            return {"ceilings": roofline.ceilings(device)}
        entry = entries[request]
        measurement = entry.prepare()
        measurement.rounds(entry.rounds)
        return {"row": measurement.row(memory=entry.memory), "study": entry.study}
    except Exception as error:  # whatever it is, it is this row's, and the next row is measured
        return {"error": f"{type(error).__name__}: {error}"[:4000], "broken": device == "cuda" and not _works()}


def _works() -> bool:
    """Does the device still compute? After an illegal access it does not, for this process."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    entries = {entry.name: entry for entry in plan.gpu_entries(tuple(sys.argv[1:]))}
    for request in sys.stdin:
        print(json.dumps(answer(entries, request.rstrip("\n"))), file=answers, flush=True)


if __name__ == "__main__":
    main()
