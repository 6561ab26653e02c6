"""Triton kernels: the portable GPU path. ``ops.py`` registers them; importing this package imports no Triton."""
