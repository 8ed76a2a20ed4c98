"""Bytes that a case has to move through memory at least: one half of the floor that its time is held against.

The count, in bytes. `a` is the size of an activation (2 in bf16), parameters and what belongs to them are float32:

* A convolution, forward, reads each row of its input once and, where it has one, its residual, and writes each row of its
  output; in training also the rows before LayerNorm, which the backward pass needs: `a * f` a row each.
* Its backward pass reads the gradient of the output and the rows before LayerNorm, writes the gradient of the product and
  reads it again (a row's gradient is a gather from others'), reads the input and writes the gradient of the input.
* The embedding reads a row of 4 f bytes for each packed row and writes one of `a * f`.
* A head in training reads its weight (4 f bytes a label) once where one walk gives the loss and all gradients, which is
  retention; twice in cross-entropy, whose gradients need all labels' logits first; a teacher's head once.
* Adam reads and writes parameter and both moments: 24 bytes a number. A gradient is written and read: 8 bytes a number. Of the
  embedding only rows of the batch count (the others' steps can be taken when they are next read), and a past task's
  head has a gradient of as few rows as users were drawn, which need not be written out.

Left out, less than a hundredth together: convolutions' weights, masks, tables, biases, statistics. A kernel that reads a row
again for each tap, or writes a logit, moves more than the floor has; that is what the ratio is there to show.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from teracon_fast.packing import PackedBatch

PARAMETER = 4
ADAM = 6 * PARAMETER
GRADIENT = 2 * PARAMETER


@dataclass(frozen=True)
class Traffic:
    """Bytes by what they are moved for."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())

    def __add__(self, other: Traffic) -> Traffic:
        names = dict.fromkeys([*self.parts, *other.parts])
        return Traffic({name: self.parts.get(name, 0.0) + other.parts.get(name, 0.0) for name in names})


def encoder(packed: PackedBatch, channels: int, activation: int, train: bool = False, embedding: bool = True) -> Traffic:
    """A pass through the backbone: forward, and with `train` backward too."""
    rows_in = sum(table.rows_in for table in packed.convolutions)
    rows_out = packed.convolution_rows
    residuals = sum(len(table.rows) for table in packed.residuals)
    forward = rows_in + residuals + (2 if train else 1) * rows_out
    backward = (2 * rows_in + 4 * rows_out) if train else 0
    parts = {"activations": float(channels * activation * (forward + backward))}
    if embedding:
        parts["embedding"] = float(channels * (PARAMETER + activation) * len(packed.cells))
    return Traffic(parts)


def head(labels: int, channels: int, reads: int) -> Traffic:
    """A head's weight, read so many times."""
    return Traffic({"heads": float(reads * PARAMETER * channels * labels)})


def adam(name: str, numbers: float, dense_gradient: bool = True) -> Traffic:
    """A step of Adam on so many numbers."""
    return Traffic({name: numbers * (ADAM + (GRADIENT if dense_gradient else 0))})
