"""Metrics of one task: encode each distinct sequence once, rank the target of every sample among all labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from teracon_fast.data import prefetch
from teracon_fast.errors import ConfigError
from teracon_fast.methods.base import Method
from teracon_fast.model.backbone import EncodeUsers
from teracon_fast.ops import linear_rank
from teracon_fast.packing import real_lengths
from teracon_fast.train.metrics import task_metrics

if TYPE_CHECKING:
    from teracon_fast.data import TaskData


def evaluate(
    method: Method, data: TaskData, task: int, samples: NDArray[np.int64], batch_size: int = 1024,
    progress: Callable[[int, int], None] | None = None, encode: EncodeUsers | None = None,
) -> dict[str, float]:  # fmt: skip
    """Metrics of a task over the given samples, every one counted, its target ranked among all labels.

    A next-item task predicts the last item of each sequence from the ones before it.

    Args:
        method: has learned the task. data: of the task. task: counted from 0.
        samples: int64 `[n]`, numbers of samples of `data`.
        batch_size: sequences encoded at a time.
        progress: called with (samples done, samples in all) after each batch; may raise to interrupt.
        encode: the task's encoder, where one has been made: see `Method.encoders`.

    Returns:
        See `metrics.task_metrics`: MRR, hit and NDCG at 5 and 20 and hit@1, or the accuracy of at most 20 labels.

    Raises:
        ConfigError: the head of the method has another size than the task has labels, or there are no samples.
    """
    head = method.head(task)
    if head.out_features != data.num_labels:
        raise ConfigError(f"task {task + 1}: the data have {data.num_labels} labels, the model {head.out_features}")
    if len(samples) == 0:
        raise ConfigError(f"task {task + 1} ({data.name}): got no samples to evaluate, expected at least one")
    encode = method.encoder(task) if encode is None else encode
    ranks = target_ranks(encode, head, data, samples, batch_size, progress, method.sizes.backend)
    return task_metrics(ranks, data.num_labels)


@torch.inference_mode()
def target_ranks(
    encode: EncodeUsers, head: nn.Linear, data: TaskData, samples: NDArray[np.int64], batch_size: int = 1024,
    progress: Callable[[int, int], None] | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Rank (0 the best) of each sample's target, int64 `[n]` on the CPU, in the order of `samples`.

    Args:
        encode: see `Method.encoder`. head: of the task. backend: of `ops.linear_rank`.
        All others: as `evaluate`.
    """
    device = head.weight.device
    drop_last = int(data.kind == "next_item")
    chosen = np.asarray(data.samples[samples])
    order = np.argsort(chosen[:, 0], kind="stable")  # samples of one row become neighbours
    rows, first = np.unique(chosen[order, 0], return_index=True)
    first = np.append(first, len(order))
    ranks = torch.empty(len(order), dtype=torch.int64)
    with closing(prefetch(_distinct(data.sequences, rows, batch_size))) as batches:
        for low, high, x, lengths, same in batches:
            hidden = encode(x, drop_last, lengths)
            part = order[first[low] : first[high]]
            of_sample = np.repeat(same, np.diff(first[low : high + 1]))
            targets = torch.from_numpy(chosen[part, 1].astype(np.int64)).to(device)
            of_state = torch.from_numpy(of_sample).to(device)
            found = linear_rank(hidden, head.weight, head.bias, targets, of_state, backend=backend)
            ranks[torch.from_numpy(part)] = found.cpu()
            if progress is not None:
                progress(int(first[high]), len(order))
    return ranks


def _distinct(
    sequences: NDArray[np.int32], rows: NDArray[np.integer], batch_size: int
) -> Iterator[tuple[int, int, Tensor, NDArray[np.int64], NDArray[np.int64]]]:
    """For each part `rows[low:high]`: low, high, its distinct sequences int64 `[n, L]`, their real lengths int64 `[n]`,
    and for each row of the part which of them it is."""
    for low in range(0, len(rows), batch_size):
        high = min(low + batch_size, len(rows))
        found, same = np.unique(sequences[rows[low:high]], axis=0, return_inverse=True)
        x = torch.from_numpy(found.astype(np.int64))
        yield low, high, x, real_lengths(x), same.reshape(-1)
