"""Sizes of the networks that are measured, their inputs, and the operations and bytes that their results need.

Only convolutions and heads are counted: normalization, masks, losses and Adam are less than a hundredth of the operations. Useful
convolution outputs are the packer's rows: the receptive-field cone of the positions asked for, with the pad prefix of one mask
once. Bytes count each row once for each kernel that must read or write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.harness import Operations
from teracon_fast.ops import pack
from teracon_fast.packing import PackedBatch, Streams, geometry

# Real lengths of the sequences that the authors publish as an example.
REAL_LENGTHS = (46, 12, 100, 43, 100, 27, 100, 100, 37, 62, 26, 90, 30, 21, 45, 13, 13, 49, 20, 14)


@dataclass(frozen=True)
class Shape:
    """Sizes: `batch` users for tasks after the first, `first_batch` for task 1, `evaluated` users in the evaluation; `labels` of
    each task, of which further tasks have as many as the last one."""

    length: int = 100
    channels: int = 256
    dilations: tuple[int, ...] = (1, 4) * 4
    kernel_size: int = 3
    labels: tuple[int, ...] = (20_000, 2_000, 8)
    batch: int = 256
    first_batch: int = 32
    evaluated: int = 512
    compiler: str = "inductor"

    def task_labels(self, tasks: int) -> list[int]:
        """Number of labels of each of so many tasks."""
        return [*self.labels[:tasks], *[self.labels[-1]] * (tasks - len(self.labels))]

    def model_para(self, tasks: int) -> dict[str, Any]:
        """The published constructor dict of a network of so many tasks."""
        para = {
            "item_size": self.labels[0], "dilated_channels": self.channels, "dilations": list(self.dilations),
            "kernel_size": self.kernel_size, "task_embs": [0.0, 2.0],
        }  # fmt: skip
        return para if tasks == 1 else para | {"num_task": tasks, "target_item_size": self.task_labels(tasks)}

    def lengths(self, users: int) -> NDArray[np.int64]:
        """Real lengths, int64 [users]."""
        return np.maximum(np.resize(REAL_LENGTHS, users) * self.length // 100, 1).astype(np.int64)

    def items(self, users: int) -> Tensor:
        """Random left-padded sequences, int64 [users, L]."""
        x = torch.randint(1, self.labels[0], (users, self.length), generator=torch.Generator().manual_seed(users))
        pads = self.length - torch.from_numpy(self.lengths(users))
        return x.masked_fill(torch.arange(self.length) < pads[:, None], 0)

    def pack(self, lengths: NDArray[np.int64], requests: Sequence[Streams] | None = None) -> PackedBatch:
        """The rows of a pass for the last positions under given requests; None: all users under one mask."""
        requests = [Streams(np.arange(len(lengths)))] if requests is None else requests
        return pack(lengths, requests, geometry(self.length, self.dilations, self.kernel_size))

    def pack_next_item(self, users: int) -> PackedBatch:
        """The rows of task 1's pass: all positions but the last."""
        layers = geometry(self.length - 1, self.dilations, self.kernel_size, True)
        return pack(np.maximum(self.lengths(users) - 1, 0), [Streams(np.arange(users))], layers)

    def encoder(self, packed: PackedBatch, positions: int) -> Operations:
        """Forward pass of the backbone; `positions` is what the dense one computes in each convolution."""
        per_output = 2 * self.kernel_size * self.channels**2
        return Operations(per_output * packed.convolution_rows, per_output * positions * 2 * len(self.dilations))

    def head(self, rows: int, labels: int, dense_rows: int | None = None) -> Operations:
        """Forward pass of a linear head over `rows` states."""
        per_row = 2 * self.channels * labels
        return Operations(per_row * rows, per_row * (rows if dense_rows is None else dense_rows))

    def next_item(self, users: int) -> Operations:
        """Forward pass of task 1."""
        packed, positions = self.pack_next_item(users), users * (self.length - 1)
        rows = len(packed.convolutions[-1].taps)
        return self.encoder(packed, positions) + self.head(rows, self.labels[0], positions)

    def encoder_bytes(self, packed: PackedBatch, embedding: bool = True) -> float:
        """Of a forward pass in bf16: a convolution reads its input and its residual, and writes its output."""
        rows = sum(table.rows_in for table in packed.convolutions) + packed.convolution_rows
        rows += sum(len(table.rows) for table in packed.residuals)
        return float(self.channels * (2 * rows + ((4 + 2) * len(packed.cells) if embedding else 0)))


TTL = Shape()
# Small enough for a test: everything in seconds. Its times mean nothing.
TINY = Shape(20, 16, (1, 2), 3, (60, 30, 8), batch=24, first_batch=8, evaluated=48, compiler="eager")
