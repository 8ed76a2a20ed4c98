"""`torch` uses the compiled extension wherever it is loaded: tables are built alike under both names."""

from teracon_fast.ops.pack.torch import tables

__all__ = ["tables"]
