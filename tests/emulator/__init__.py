"""The CUDA kernels of this package on the CPU: one fiber per thread, every access checked. See README.md."""

from .session import EmulatorError, Session

__all__ = ["EmulatorError", "Session"]
