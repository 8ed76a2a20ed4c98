"""Raw behavior logs -> a prepared, memory-mapped task sequence -> splits -> batches.

for block in read_sequences_csv("watch.csv", labels=False): ...      # or read_parquet
with DatasetWriter("data/ttl", name="ttl", length=100) as writer:    # raw ids in, dense indices on disk
    writer.add_task("watch", "next_item", read_sequences_csv("watch.csv", labels=False))
data = open_dataset("data/ttl")                                      # memory-mapped
split = split_task(data.tasks[0], by="sample", seed=0)
for batch in epoch_batches(split.train, 32, seed=0, epoch=0):
    x, y = fetch(data.tasks[0], batch)
"""

from teracon_fast.data.batches import epoch_batches, fetch
from teracon_fast.data.blocks import Block, pad_left
from teracon_fast.data.dictionaries import Dictionary, read_published_index
from teracon_fast.data.layout import TaskMeta
from teracon_fast.data.loader import Batch, BatchSource
from teracon_fast.data.parquet import read_parquet
from teracon_fast.data.prefetch import prefetch
from teracon_fast.data.published_csv import read_sequences_csv
from teracon_fast.data.split import Split, check_tasks, split_task
from teracon_fast.data.store import DatasetWriter, TaskData, TaskSequence, open_dataset

__all__ = [
    "Batch",
    "BatchSource",
    "Block",
    "DatasetWriter",
    "Dictionary",
    "Split",
    "TaskData",
    "TaskMeta",
    "TaskSequence",
    "prefetch",
    "check_tasks",
    "epoch_batches",
    "fetch",
    "open_dataset",
    "pad_left",
    "read_parquet",
    "read_published_index",
    "read_sequences_csv",
    "split_task",
]
