"""Rows of an embedding, with a gradient that may be sparse: no dense matrix for the few rows that a batch reads."""

from teracon_fast.ops.embedding_rows.api import embedding_rows, sum_rows

__all__ = ["embedding_rows", "sum_rows"]
