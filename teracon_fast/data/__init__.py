"""Raw behaviour logs -> a prepared, memory-mapped sequence of tasks -> splits -> batches."""

from teracon_fast.data.blocks import Block, pad_left
from teracon_fast.data.dictionaries import Dictionary, read_published_index
from teracon_fast.data.store import DatasetWriter, TaskMeta

__all__ = ["Block", "DatasetWriter", "Dictionary", "TaskMeta", "pad_left", "read_published_index"]
