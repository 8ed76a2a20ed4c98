"""The baseline that learns nothing from sequences: labels ranked by their frequency in the training samples."""

from __future__ import annotations

import numpy as np
import torch

from teracon_fast.data import split_task
from teracon_fast.reproduce.grids import Column, Entry, Grid, Line
from teracon_fast.reproduce.plan import Plan
from teracon_fast.reproduce.tables import metric_name, task_name
from teracon_fast.train.metrics import headline, task_metrics


def frequency_grid(plan: Plan) -> Grid:
    """One line: the test metric of every task of the data set, for the split of each seed."""
    columns, entries = [], []
    for number, data in enumerate(plan.dataset.tasks, 1):
        labels, values = np.asarray(data.samples[:, 1], dtype=np.int64), []
        for seed in plan.seeds:
            split = split_task(data, plan.config.split_by, seed)
            counts = np.bincount(labels[split.train], minlength=data.num_labels)
            rank = np.empty(data.num_labels, dtype=np.int64)
            rank[np.argsort(-counts, kind="stable")] = np.arange(data.num_labels)
            ranks = torch.from_numpy(rank[labels[split.test]])
            values.append(task_metrics(ranks, data.num_labels)[headline(data.num_labels)])
        heading = f"{task_name(plan, number)} {metric_name(plan, number)}"
        columns.append(Column(heading, (heading,)))
        entries.append((Entry(tuple(values)),))
    line = Line("labels by frequency", tuple(entries))
    return Grid("Without learning from sequences", "ranking", tuple(columns), (line,))
