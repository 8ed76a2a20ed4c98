"""The tables of a packed pass."""

from teracon_fast.ops.pack.api import pack

__all__ = ["pack"]
