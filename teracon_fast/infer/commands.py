"""A trained run at work: representations, recommendations and label probabilities of users, streamed to Parquet.

Users come in blocks from a CSV (published form, without or with labels, which are ignored), a Parquet file or a prepared
folder; no more than a few blocks are held at any time. Sequences shorter than the run's length are padded on the left,
longer ones keep their most recent items. Outputs are written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from teracon_fast.data import Dictionary, TaskSequence, open_dataset, prefetch
from teracon_fast.data.user_input import InputBlock, Inputs, Unseen, check_unseen, encode_items, fit
from teracon_fast.errors import ConfigError, TeraconError
from teracon_fast.files import atomic_write
from teracon_fast.model.checkpoints import load_model
from teracon_fast.model.fast_tcn import FastTCN
from teracon_fast.ops import linear_topk
from teracon_fast.packing import real_lengths
from teracon_fast.train.evaluation import evaluate

if TYPE_CHECKING:
    from teracon_fast.config import RunConfig
    from teracon_fast.data import TaskData

Progress = Callable[[int], None]
MAX_PREDICTED = 100  # labels that `predict` gives a column each
ROW_GROUP_BYTES = 32 << 20


@dataclass(frozen=True)
class TrainedTask:
    """A task of a run: `labels` are the items for a next_item task. Of a grown run only the first `trained` are trained."""

    name: str
    kind: str
    labels: Dictionary
    trained: int


@dataclass(frozen=True)
class TrainedRun:
    """A run read back for inference.

    Attributes:
        path: run folder. config: its configuration.
        model: weights after the newest finished task (or the one asked for), in eval mode on its device.
        s: mask scale at inference.
        length: L, items a sequence.
        items: item dictionary.
        tasks: the tasks that the model has learnt.
    """

    path: Path
    config: RunConfig
    model: FastTCN
    s: float
    length: int
    items: Dictionary
    tasks: list[TrainedTask]

    def task(self, number: int) -> TrainedTask:
        """Task `number`, from 1.

        Raises:
            ConfigError: the model has not learnt it.
        """
        if not 1 <= number <= len(self.tasks):
            raise ConfigError(f"task: got {number}, expected 1 to {len(self.tasks)}, the tasks learnt by {self.path}")
        return self.tasks[number - 1]


def finished_tasks(run: Path) -> int:
    """Number of tasks that a run has finished; the checkpoint of a task in training is its best so far, not counted."""
    from teracon_fast.report.run_report import load_run

    ended = [task for task, log in load_run(run).logs.items() if log.end is not None]
    return max(ended, default=0)


def open_run(
    run: str | Path, after: int | None = None, device: str = "auto", backend: str = "auto", threads: int | None = None
) -> TrainedRun:
    """Open a run folder for inference.

    Args:
        run: run folder.
        after: use the weights after this task (from 1); None: after the newest finished one.
        device: "auto", "cpu", "cuda", "cuda:N".
        backend: as `FastTCN`.
        threads: CPU threads; None leaves PyTorch's choice.

    Raises:
        ConfigError: no such run, task or device. CheckpointError, DataError: a file is missing or damaged.
    """
    from teracon_fast.config import load_config
    from teracon_fast.report.run_report import read_json
    from teracon_fast.train.folder import resolved_device, trained_labels

    run = Path(run)
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run}: has no config.toml, expected a run folder that `teracon train` made")
    done = finished_tasks(run)
    if not done:
        raise ConfigError(f"{run}: no task is finished yet")
    number = done if after is None else after
    if not 1 <= number <= done:
        raise ConfigError(f"{run}: got task {number}, expected 1 to {done}, the tasks that are finished")
    config = load_config(path=run / "config.toml", overrides={"device": device})
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(run / "checkpoints" / f"task{number}.safetensors", resolved_device(config), backend, config.algorithm)
    dataset = read_json(run / "dataset.json")
    items = Dictionary.load(run / "items.parquet")
    if len(items) != model.num_items:
        raise ConfigError(f"{run}: the item dictionary has {len(items)} items, the model {model.num_items}")
    tasks, trained = [], trained_labels(run)
    for index, meta in enumerate(dataset["tasks"][:number], 1):
        own = run / f"task{index}" / "labels.parquet"
        labels = items if meta["kind"] == "next_item" else Dictionary.load(own)
        tasks.append(TrainedTask(meta["name"], meta["kind"], labels, trained.get(index, len(labels))))
        if len(tasks[-1].labels) != model.labels[index - 1]:
            got = f"{len(tasks[-1].labels)} labels, the model {model.labels[index - 1]}"
            raise ConfigError(f"{run}: the dictionary of task {index} has {got}")
    s = config.for_task(number).s_max
    return TrainedRun(run, config, model.eval(), s, int(dataset["length"]), items, tasks)


def measure(
    run: TrainedRun,
    data: str | Path | None = None,
    split: str = "test",
    batch_size: int = 1024,
    progress: Callable[[int, str, int, int], None] | None = None,
    unseen: Unseen = "error",
    say: Callable[[str], None] | None = None,
) -> dict[int, dict[str, float]]:
    """Metrics of every task that the model has learnt: a row of R with all its metrics.

    Args:
        run: a trained run.
        data: prepared folder; None: the one that the run was trained from.
        split: "test", "valid" or "train", cut as in training.
        batch_size: sequences encoded at a time.
        progress: called with (task, split, samples done, samples in all).
        unseen: as `Inputs`, for data with other dictionaries than the run's, which are then read by raw id; "error" refuses
            them. Samples whose label the model does not have (a bucket is one of task 1) are left out.
        say: told how many unseen items there were, and how many samples were left out.

    Returns:
        task number (from 1) -> metrics.

    Raises:
        ConfigError: another split, data that are not those of the run, no buckets, or no samples left.
    """
    from teracon_fast.train.run import task_split

    if split not in ("test", "valid", "train"):
        raise ConfigError(f"split: got {split!r}, expected test, valid or train")
    dataset = open_dataset(run.config.data if data is None else data)
    strangers = _Strangers(run, dataset, unseen) if unseen != "error" else None
    if strangers is None:
        _require_same_labels(run, dataset)
    found = {}
    for number in range(1, len(run.tasks) + 1):
        task = dataset.tasks[number - 1]
        samples = getattr(task_split(run.config, task), split)
        if strangers is not None:
            task, note = strangers.read(number, task, samples)
            samples = np.arange(len(task.samples))
            if say is not None and note:
                say(note)
        show = None if progress is None else partial(progress, number, split)
        found[number] = evaluate(run.model, task, number - 1, samples, run.s, batch_size, show)
    return found


class _Strangers:
    """Samples of a data set with other dictionaries than the run's, read by raw id."""

    def __init__(self, run: TrainedRun, dataset: TaskSequence, unseen: Unseen) -> None:
        check_unseen(unseen, run.items)
        _require_tasks(run, dataset)
        self._run, self._unseen = run, unseen
        self._codes = encode_items(run.items, unseen, dataset.item_ids())

    def read(self, number: int, task: TaskData, samples: NDArray[np.int64]) -> tuple[TaskData, str]:
        """The samples of task `number` by the indices of the run, and what was unseen of them, in words."""
        chosen = np.asarray(task.samples[samples])
        if task.kind == "next_item":
            label_of = np.where(self._codes < -1, -1 - self._codes, self._codes)
        else:
            label_of = self._run.task(number).labels.encode(task.label_ids())
        labels = label_of[chosen[:, 1]]
        kept = labels >= 0
        rows, row = np.unique(chosen[kept, 0], return_inverse=True)
        codes = self._codes[task.sequences[rows]]
        sequences = fit(codes, self._unseen, self._run.length)
        read = replace(
            task, num_labels=len(self._run.task(number).labels), sequences=sequences,
            samples=np.stack([row, labels[kept]], 1).astype(np.int32),
        )  # fmt: skip
        places, left_out = int((codes < 0).sum()), int((~kept).sum())
        told = f"T{number} {task.name}: {places:,} items unseen by the run, {left_out:,} samples left out for their labels"
        return read, told if places or left_out else ""


def _require_tasks(run: TrainedRun, dataset: TaskSequence) -> None:
    if len(dataset.tasks) < len(run.tasks):
        raise ConfigError(
            f"{dataset.path}: got {len(dataset.tasks)} tasks, expected the {len(run.tasks)} of {run.path}"
        )


def _require_same_labels(run: TrainedRun, dataset: TaskSequence) -> None:
    """The indices in a prepared folder mean something only under the dictionaries they were made with."""
    _require_tasks(run, dataset)
    pairs = [("items", dataset.item_ids(), run.items)]
    for number, (data, task) in enumerate(zip(dataset.tasks, run.tasks, strict=False), 1):
        if task.kind == "label":
            pairs.append((f"labels of task {number}", data.label_ids(), task.labels))
    for what, got, expected in pairs:
        if not np.array_equal(got, expected.ids):
            raise ConfigError(
                f"{dataset.path}: its {what} are not those of {run.path}, expected the data it was trained from; "
                "--unseen pad, drop or bucket reads others by raw id"
            )


def encode_blocks(
    run: TrainedRun, inputs: Inputs, tasks: Sequence[int], batch_size: int = 1024, progress: Progress | None = None
) -> Generator[tuple[InputBlock, list[Tensor]], None, None]:
    """Representations (state of the last position, which has seen every item) block by block.

    Args:
        run: a trained run.
        inputs: the users.
        tasks: task numbers, from 1.
        batch_size: users encoded at a time.
        progress: called with the number of users done so far.

    Yields:
        the block and one `[n, f]` tensor a task. A thread prefetches: close the generator (`contextlib.closing`) where it
        may be left before its end.
    """
    for number in tasks:
        run.task(number)
    done = 0
    encode = run.model.encoder(run.s)
    with closing(prefetch(_prepared(inputs, batch_size))) as blocks:
        for block, x, lengths in blocks:
            yield block, [encode(x, number - 1, 0, lengths) for number in tasks]
            done += len(x)
            if progress is not None:
                progress(done)


def _prepared(inputs: Inputs, batch_size: int) -> Iterator[tuple[InputBlock, Tensor, NDArray[np.int64]]]:
    """Each block with its sequences as int64 `[n, L]` and their real lengths."""
    for block in inputs.blocks(batch_size):
        x = torch.from_numpy(block.x.astype(np.int64))
        yield block, x, real_lengths(x)


def embed(
    run: TrainedRun,
    inputs: Inputs,
    output: str | Path,
    tasks: Sequence[int],
    batch_size: int = 1024,
    progress: Progress | None = None,
) -> int:
    """Write user representations: the key columns of the input, then `task_<N>` fixed_size_list<float32>[f] a task.

    Returns:
        number of users.
    """
    import pyarrow as pa

    kind = pa.list_(pa.float32(), run.model.channels)
    schema = _schema(run, inputs, [(f"task_{number}", kind) for number in tasks])
    users = 0
    encoded = encode_blocks(run, inputs, tasks, batch_size, progress)
    with _parquet(output, schema) as write, closing(encoded) as blocks:
        for block, hidden in blocks:
            columns = [_flat(state.float()) for state in hidden]
            write(
                [pa.FixedSizeListArray.from_arrays(pa.array(values), run.model.channels) for values in columns], block
            )
            users += len(block.x)
    return users


def recommend(
    run: TrainedRun,
    inputs: Inputs,
    output: str | Path,
    task: int,
    k: int = 10,
    exclude_seen: bool = False,
    long: bool = False,
    batch_size: int = 1024,
    progress: Progress | None = None,
) -> int:
    """Write the k best labels of a task for each user, best first, by raw id, with their scores (logits).

    Columns: the key columns of the input, then `items` list<string> and `scores` list<float32>; with `long`, one row a
    recommendation: `rank` (from 1), `item`, `score`. Never recommended are the pad, buckets, and labels that came by growth
    and so are untrained. Where fewer than k are left, the list is shorter.

    Args:
        run, inputs, output, batch_size, progress: as `embed`.
        task: from 1.
        exclude_seen: leave out items of the user's sequence; for a task whose labels are not items, an error.

    Returns:
        number of users.

    Raises:
        ConfigError: k is not 1 to the number of labels; exclude_seen on a task whose labels are not items.
    """
    import pyarrow as pa

    found, label_of_item = run.task(task), None
    if not 1 <= k <= found.trained:
        raise ConfigError(f"top-k: got {k}, expected 1 to {found.trained}, the labels of task {task} ({found.name})")
    if exclude_seen:
        label_of_item = _label_of_item(run, task)
    names = np.asarray(found.labels.ids)
    never = list(range(1 + run.items.buckets)) if found.kind == "next_item" else []
    weight, bias = _trained_head(run, task)
    if long:
        columns = [("rank", pa.int32()), ("item", pa.string()), ("score", pa.float32())]
    else:
        columns = [("items", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))]
    users = 0
    encoded = encode_blocks(run, inputs, [task], batch_size, progress)
    with _parquet(output, _schema(run, inputs, columns)) as write, closing(encoded) as blocks:
        for block, (hidden,) in blocks:
            exclude = _exclusions(block.x, label_of_item, never, hidden.device)
            scores, labels = (part.cpu().numpy() for part in linear_topk(hidden, weight, bias, k, exclude))
            kept = labels >= 0
            items, values = (
                pa.array(names[labels[kept]].tolist(), pa.string()),
                pa.array(scores[kept].astype(np.float32)),
            )
            if long:
                user, rank = np.nonzero(kept)
                write([pa.array((rank + 1).astype(np.int32)), items, values], block, user)
            else:
                offsets = pa.array(np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32))
                write([pa.ListArray.from_arrays(offsets, part) for part in (items, values)], block)
            users += len(block.x)
    return users


def predict(
    run: TrainedRun,
    inputs: Inputs,
    output: str | Path,
    task: int,
    batch_size: int = 1024,
    progress: Progress | None = None,
) -> int:
    """Write the probability of every label of a task with few labels: the key columns, `label`, `probability`, `p_<label>`...

    Labels that came by growth, and so are untrained, are left out: the probabilities are those of the others.

    Returns:
        number of users.

    Raises:
        ConfigError: the task has more than MAX_PREDICTED labels.
    """
    import pyarrow as pa

    found = run.task(task)
    if found.trained > MAX_PREDICTED:
        raise ConfigError(
            f"task {task} ({found.name}) has {found.trained} labels, expected at most {MAX_PREDICTED}: "
            "for more, ask for the best ones with `teracon recommend`"
        )
    names = np.asarray(found.labels.ids[: found.trained])
    weight, bias = _trained_head(run, task)
    columns = [("label", pa.string()), ("probability", pa.float32()), *((f"p_{name}", pa.float32()) for name in names)]
    users = 0
    encoded = encode_blocks(run, inputs, [task], batch_size, progress)
    with _parquet(output, _schema(run, inputs, columns)) as write, closing(encoded) as blocks:
        for block, (hidden,) in blocks:
            with torch.no_grad():
                chances = torch.softmax(linear(hidden, weight, bias).float(), dim=1).cpu().numpy()
            best = chances.argmax(1)
            parts = [pa.array(names[best].tolist(), pa.string()), pa.array(chances[np.arange(len(best)), best])]
            write([*parts, *(pa.array(np.ascontiguousarray(column)) for column in chances.T)], block)
            users += len(block.x)
    return users


def _trained_head(run: TrainedRun, task: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of the labels of a task that are trained."""
    head, count = run.model.head(task - 1), run.task(task).trained
    return head.weight[:count], head.bias[:count]


def _label_of_item(run: TrainedRun, task: int) -> NDArray[np.int64]:
    """[V] index of each item among the trained labels, -1 where it has none. A label in a bucket is no item's label."""
    found = run.task(task)
    if found.kind == "next_item":
        return np.where(np.arange(len(run.items)) < found.trained, np.arange(len(run.items)), -1)
    item = run.items.encode(found.labels.ids[: found.trained])
    if (item < 0).all() or ((item < 0).any() and not run.items.buckets):
        stranger = found.labels.ids[int((item < 0).argmax())]
        raise ConfigError(f"exclude-seen: the labels of task {task} ({found.name}) are not items; {stranger!r} is none")
    table = np.full(len(run.items), -1, dtype=np.int64)
    table[item[item >= 0]] = np.flatnonzero(item >= 0)
    return table


def _exclusions(
    x: NDArray[np.int32], label_of_item: NDArray[np.int64] | None, always: list[int], device: torch.device
) -> list[Tensor] | None:
    if label_of_item is None and not always:
        return None
    if label_of_item is None:
        return [torch.tensor(always, device=device)] * len(x)
    labels = label_of_item[x]
    return [torch.from_numpy(np.unique([*row[row >= 0], *always]).astype(np.int64)).to(device) for row in labels]


def _flat(values: Tensor) -> NDArray[np.float32]:
    return values.contiguous().cpu().numpy().reshape(-1)


def _schema(run: TrainedRun, inputs: Inputs, columns: Sequence[tuple[str, Any]]) -> Any:
    import pyarrow as pa

    keys = inputs.keys()
    taken = {name for name, _ in keys} & {name for name, _ in columns}
    if taken:
        raise TeraconError(f"the input's column {taken.pop()!r} has the name of an output column; rename it")
    notes = {"teracon_fast.run": run.path.resolve().name, "teracon_fast.after_task": str(len(run.tasks))}
    return pa.schema([*keys, *columns], metadata=notes)


@contextmanager
def _parquet(path: str | Path, schema: Any) -> Iterator[Callable[..., None]]:
    """A Parquet file in the making: yields `write(columns, block, rows=None)`, which puts the block's keys before the
    columns. Blocks are gathered into row groups of about ROW_GROUP_BYTES."""
    import pyarrow as pa
    from pyarrow import parquet

    if Path(path).suffix != ".parquet":
        raise ConfigError(f"output: got {str(path)!r}, expected a name ending in .parquet")
    waiting: list[Any] = []
    with atomic_write(path) as file, parquet.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()

        def write(columns: list[Any], block: InputBlock, rows: NDArray[np.int64] | None = None) -> None:
            keys = block.keys if rows is None else [key.take(pa.array(rows)) for key in block.keys]
            waiting.append(pa.Table.from_arrays([*keys, *columns], schema=schema))
            if sum(table.nbytes for table in waiting) >= ROW_GROUP_BYTES:
                flush()

        yield write
        flush()
