"""Representations, recommendations and label probabilities of users by a trained run, streamed to Parquet.

Users come in blocks from a CSV (published form, labels ignored), a Parquet file or a prepared folder; only a few blocks are held
at any time. Sequences shorter than the run's length are padded on the left, longer ones keep their most recent items. Outputs
are written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from teracon_fast.data import prefetch
from teracon_fast.data.user_input import InputBlock, Inputs
from teracon_fast.errors import ConfigError, TeraconError
from teracon_fast.files import atomic_write
from teracon_fast.infer.open import TrainedRun, TrainedTask
from teracon_fast.ops import linear_topk
from teracon_fast.packing import real_lengths

Progress = Callable[[int], None]
MAX_PREDICTED = 100  # labels that `predict` gives a column each
ROW_GROUP_BYTES = 32 << 20


def encode_blocks(
    run: TrainedRun, inputs: Inputs, tasks: Sequence[int | str], batch_size: int = 1024, progress: Progress | None = None
) -> Generator[tuple[InputBlock, list[Tensor]], None, None]:
    """Representations (state of the last position, which has seen every item) block by block.

    Args:
        run: a trained run.
        inputs: the users.
        tasks: by name, or by number from 1.
        batch_size: users encoded at a time.
        progress: called with the number of users done so far.

    Yields:
        The block, and for each task a `[n, f]` tensor. A thread prefetches: close the generator (`contextlib.closing`) where it
        may be left before its end.
    """
    chosen, done = [run.task(task).number - 1 for task in tasks], 0
    encoders = run.method.encoders(chosen)
    sequences = ((block, torch.from_numpy(block.x.astype(np.int64))) for block in inputs.blocks(batch_size))
    with closing(prefetch((block, x, real_lengths(x)) for block, x in sequences)) as blocks:
        for block, x, lengths in blocks:
            yield block, [encoders[task](x, 0, lengths) for task in chosen]
            done += len(x)
            if progress is not None:
                progress(done)


def embed(
    run: TrainedRun, inputs: Inputs, output: str | Path, tasks: Sequence[int | str], batch_size: int = 1024,
    progress: Progress | None = None,
) -> int:  # fmt: skip
    """Write user representations: the key columns of the input, then for each task `task_<N>`, fixed_size_list<float32>[f].

    Returns the number of users, as `recommend` and `predict` do.

    Raises:
        ConfigError: a task that the run has not learned, or one given twice.
    """
    import pyarrow as pa

    channels, chosen = run.method.sizes.channels, [run.task(task) for task in tasks]
    for task in chosen:
        if chosen.count(task) > 1:
            raise ConfigError(f"task: got {task} twice, expected each task once")

    def columns(block: InputBlock, hidden: list[Tensor]) -> list[Any]:
        flat = (state.float().contiguous().cpu().numpy().reshape(-1) for state in hidden)
        return [pa.FixedSizeListArray.from_arrays(pa.array(values), channels) for values in flat]

    kinds = [(f"task_{task.number}", pa.list_(pa.float32(), channels)) for task in chosen]
    return _write(run, inputs, output, kinds, chosen, columns, batch_size, progress)


def recommend(
    run: TrainedRun, inputs: Inputs, output: str | Path, task: int | str, k: int = 10, exclude_seen: bool = False,
    long: bool = False, batch_size: int = 1024, progress: Progress | None = None,
) -> int:  # fmt: skip
    """Write the k best labels of a task for each user, best first, by raw id, with their scores (logits).

    Columns: the key columns of the input, then `items` list<string> and `scores` list<float32>; with `long`, one row per
    recommendation: `rank` (from 1), `item`, `score`. The pad, buckets, and the untrained labels of a grown run are never
    recommended. Where fewer than k are left, the list is shorter.

    Args:
        task: by name, or by number from 1.
        exclude_seen: leave out items of the user's sequence.

    Raises:
        ConfigError: k is not 1 to the number of labels; exclude_seen on a task whose labels are not items.
    """
    import pyarrow as pa

    found = run.task(task)
    if not 1 <= k <= found.trained:
        raise ConfigError(f"top-k: got {k}, expected 1 to {found.trained}, the labels of {found}")
    label_of_item = _label_of_item(run, found) if exclude_seen else None
    names = np.asarray(found.labels.ids)
    never = list(range(1 + run.items.buckets)) if found.kind == "next_item" else []
    weight, bias = _trained_head(run, found)

    def columns(block: InputBlock, hidden: list[Tensor]) -> Any:
        exclude = _exclusions(block.x, label_of_item, never, hidden[0].device)
        scores, labels = (part.cpu().numpy() for part in linear_topk(hidden[0], weight, bias, k, exclude))
        kept = labels >= 0
        items = pa.array(names[labels[kept]].tolist(), pa.string())
        values = pa.array(scores[kept].astype(np.float32))
        if long:
            user, rank = np.nonzero(kept)
            return [pa.array((rank + 1).astype(np.int32)), items, values], user
        offsets = pa.array(np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32))
        return [pa.ListArray.from_arrays(offsets, part) for part in (items, values)]

    if long:
        kinds = [("rank", pa.int32()), ("item", pa.string()), ("score", pa.float32())]
    else:
        kinds = [("items", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))]
    return _write(run, inputs, output, kinds, [found], columns, batch_size, progress)


def predict(
    run: TrainedRun, inputs: Inputs, output: str | Path, task: int | str, batch_size: int = 1024,
    progress: Progress | None = None,
) -> int:  # fmt: skip
    """Write the probability of every label of a task with few labels: the key columns, `label`, `probability`, `p_<label>`...

    The untrained labels of a grown run are left out: the probabilities are those of the others.

    Raises:
        ConfigError: the task has more than MAX_PREDICTED labels.
    """
    import pyarrow as pa

    found = run.task(task)
    if found.trained > MAX_PREDICTED:
        raise ConfigError(
            f"{found} has {found.trained} labels, expected at most {MAX_PREDICTED}; `teracon recommend` writes the best of more"
        )
    names = np.asarray(found.labels.ids[: found.trained])
    weight, bias = _trained_head(run, found)

    @torch.no_grad()
    def columns(block: InputBlock, hidden: list[Tensor]) -> list[Any]:
        chances = torch.softmax(linear(hidden[0], weight, bias).float(), dim=1).cpu().numpy()
        best = chances.argmax(1)
        first = [pa.array(names[best].tolist(), pa.string()), pa.array(chances[np.arange(len(best)), best])]
        return first + [pa.array(np.ascontiguousarray(column)) for column in chances.T]

    kinds = [("label", pa.string()), ("probability", pa.float32()), *((f"p_{name}", pa.float32()) for name in names)]
    return _write(run, inputs, output, kinds, [found], columns, batch_size, progress)


def _trained_head(run: TrainedRun, task: TrainedTask) -> tuple[Tensor, Tensor]:
    """Weight and bias of a task's trained labels."""
    head = run.method.head(task.number - 1)
    return head.weight[: task.trained], head.bias[: task.trained]


def _label_of_item(run: TrainedRun, task: TrainedTask) -> NDArray[np.int64]:
    """[V] index of each item among the task's trained labels, -1 where it has none. A label in a bucket is no item's label."""
    if task.kind == "next_item":
        return np.where(np.arange(len(run.items)) < task.trained, np.arange(len(run.items)), -1)
    item = run.items.encode(task.labels.ids[: task.trained])
    if (item < 0).all() or ((item < 0).any() and not run.items.buckets):
        stranger = task.labels.ids[int((item < 0).argmax())]
        raise ConfigError(f"exclude-seen: the labels of {task} are not items; {stranger!r} is none")
    table = np.full(len(run.items), -1, dtype=np.int64)
    table[item[item >= 0]] = np.flatnonzero(item >= 0)
    return table


def _exclusions(
    x: NDArray[np.int32], label_of_item: NDArray[np.int64] | None, always: list[int], device: torch.device
) -> list[Tensor] | None:
    if label_of_item is None:
        return [torch.tensor(always, device=device)] * len(x) if always else None
    labels = label_of_item[x]
    return [torch.from_numpy(np.unique([*row[row >= 0], *always]).astype(np.int64)).to(device) for row in labels]


def _write(
    run: TrainedRun, inputs: Inputs, output: str | Path, kinds: Sequence[tuple[str, Any]], tasks: Sequence[TrainedTask],
    columns: Callable[[InputBlock, list[Tensor]], Any], batch_size: int, progress: Progress | None,
) -> int:  # fmt: skip
    """Write what `columns` makes of each block and its representations; returns the number of users.

    Args:
        kinds: name and Arrow type of each column behind the key columns.
        tasks: those that the users are encoded for.
        columns: gives the Arrow arrays; where these are not one row per user, a pair of them and each row's user in the block.
    """
    keys, users = inputs.keys(), 0
    taken = {name for name, _ in keys} & {name for name, _ in kinds}
    if taken:
        raise TeraconError(f"the input's column {taken.pop()!r} has the name of an output column; rename it")
    encoded = encode_blocks(run, inputs, [task.number for task in tasks], batch_size, progress)
    with _parquet(output, [*keys, *kinds], run) as write, closing(encoded) as blocks:
        for block, hidden in blocks:
            made = columns(block, hidden)
            write(block, *(made if isinstance(made, tuple) else (made,)))
            users += len(block.x)
    return users


@contextmanager
def _parquet(path: str | Path, kinds: Sequence[tuple[str, Any]], run: TrainedRun) -> Iterator[Callable[..., None]]:
    """A Parquet file: yields `write(block, columns, rows=None)`, which puts the block's keys, or those of some of its rows,
    before the columns. Blocks are gathered into row groups of about ROW_GROUP_BYTES."""
    import pyarrow as pa
    from pyarrow import parquet

    if Path(path).suffix != ".parquet":
        raise ConfigError(f"output: got {str(path)!r}, expected a name ending in .parquet")
    notes = {"teracon_fast.run": run.path.resolve().name, "teracon_fast.after_task": str(len(run.tasks))}
    schema = pa.schema(list(kinds), metadata=notes)
    waiting: list[Any] = []
    with atomic_write(path) as file, parquet.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()

        def write(block: InputBlock, columns: list[Any], rows: NDArray[np.int64] | None = None) -> None:
            keys = block.keys if rows is None else [key.take(pa.array(rows)) for key in block.keys]
            waiting.append(pa.Table.from_arrays([*keys, *columns], schema=schema))
            if sum(table.nbytes for table in waiting) >= ROW_GROUP_BYTES:
                flush()

        yield write
        flush()
