"""Rows of an embedding, with a gradient that may be sparse, and updates that may be lazy."""

from teracon_fast.ops.embedding_rows.api import embedding_rows, sum_rows
from teracon_fast.ops.embedding_rows.late_rows import Updates, catch_up, register, registered

__all__ = ["Updates", "catch_up", "embedding_rows", "register", "registered", "sum_rows"]
