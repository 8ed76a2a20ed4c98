"""Triton kernels, one file an operation. Installed as `teracon_fast.kernels`; import it by that name only."""
