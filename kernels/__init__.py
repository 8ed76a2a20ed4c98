"""Triton kernels, one file per operation. Installed as `teracon_fast.kernels`; import it by that name only."""
