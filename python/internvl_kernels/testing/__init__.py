"""Cases, oracle, error bounds and the correctness gate: what tests and benchmarks hold every backend to.

A ``Case`` is plain data whose ``repr`` rebuilds it; ``python -m internvl_kernels.testing "Case(...)"`` reruns it.
The oracle is ``reference.prefix_attn`` in float64. The rule, per element:

    error <= bound + 2 * (largest error of eager attention in the same dtype, per batch row and head)

The bounds (``bounds.py``, the one table of tolerances) follow from the data.
"""

from .bounds import attention_bounds, layernorm_bounds
from .cases import Case, Inputs, build, random_case, structured_cases
from .gate import correctness_gate, device_of, mismatches, oracle, run

__all__ = [
    "Case",
    "Inputs",
    "attention_bounds",
    "build",
    "correctness_gate",
    "device_of",
    "layernorm_bounds",
    "mismatches",
    "oracle",
    "random_case",
    "run",
    "structured_cases",
]
