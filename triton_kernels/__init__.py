"""Triton kernels; installed as ``internvl_kernels.triton_kernels``. This version ships none yet."""
