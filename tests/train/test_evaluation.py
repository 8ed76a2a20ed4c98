"""Metrics of a task against the plain way: the reference model, one sample at a time, full logits."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import walks, write_tiny

from teracon_fast import FastTCN, Request
from teracon_fast.data import DatasetWriter, TaskSequence, open_dataset, split_task
from teracon_fast.errors import ConfigError
from teracon_fast.methods import Teracon
from teracon_fast.reference import ReferenceTCN, target_rank
from teracon_fast.train.evaluation import evaluate, target_ranks
from teracon_fast.train.metrics import task_metrics


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TaskSequence:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", tasks=3, rows=80, length=7, items=25)


def pair(tiny: TaskSequence, tasks: int) -> tuple[Teracon, ReferenceTCN]:
    labels = [data.num_labels for data in tiny.tasks[:tasks]]
    para = {
        "item_size": tiny.num_items,
        "dilated_channels": 8,
        "dilations": [1, 2],
        "kernel_size": 3,
        "task_embs": [0, 2],
    }
    several = {"num_task": tasks, "target_item_size": labels} if tasks > 1 else {}
    reference = ReferenceTCN({**para, **several}).double()
    with torch.no_grad():
        for head in reference.task_classifier:
            head.weight.mul_(30)  # spread the scores, so that ranks differ between users
    model = FastTCN(num_items=tiny.num_items, channels=8, labels=labels, dilations=(1, 2)).double()
    model.load_state_dict(reference.state_dict())
    return Teracon.around(model, s_max=5.0), reference


@pytest.mark.parametrize(("tasks", "task"), [(1, 0), (3, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_ranks_are_those_of_the_reference(tiny: TaskSequence, tasks: int, task: int, batch_size: int) -> None:
    """Plain mask after task 1 only, relation masks later; task 1 is asked for the last item from the ones before it."""
    method, reference = pair(tiny, tasks)
    data = tiny.tasks[task]
    samples = np.random.default_rng(1).permutation(len(data.samples))[:37]
    ranks = target_ranks(method.encoder(task), method.head(task), data, samples, batch_size)
    assert ranks.dtype == torch.int64 and ranks.shape == (37,)
    masks = reference.all_masks(5.0)[:, task]
    for position, sample in enumerate(samples):
        row, label = data.samples[sample]
        x = torch.from_numpy(np.array(data.sequences[row], dtype=np.int64))[None]
        x, label = (x[:, :-1], x[0, -1].item()) if task == 0 else (x, label)
        scores = reference.task_classifier[task](reference.hidden(x, masks)[:, -1])
        assert ranks[position] == target_rank(scores, torch.tensor([int(label)]))[0], sample
    assert len(ranks.unique()) > 2, "the model tells users apart"


def test_metrics_are_those_of_the_ranks(tiny: TaskSequence) -> None:
    method, _ = pair(tiny, 3)
    for task, data in enumerate(tiny.tasks):
        samples = split_task(data).test
        expected = task_metrics(target_ranks(method.encoder(task), method.head(task), data, samples), data.num_labels)
        assert evaluate(method, data, task, samples, batch_size=5) == expected
        assert ("accuracy" in expected) == (task == 2)


def test_equal_sequences_are_encoded_once(tmp_path: Path) -> None:
    sequences = walks(10, 6, 9, seed=3)[np.repeat(np.arange(10), 4)]
    with DatasetWriter(tmp_path / "d", name="d", length=6) as writer:
        writer.add_task("next", "next_item", sequences)
        rows = np.repeat(np.arange(40), 3)
        writer.add_task("label", "label", sequences, labels=(rows, np.arange(120) % 30))
    data = open_dataset(tmp_path / "d").tasks[1]
    model = FastTCN(num_items=open_dataset(tmp_path / "d").num_items, channels=8, labels=[10, 30], dilations=(1,))
    encoded: list[int] = []
    plain, head = model.encoder(), model.head(1)

    def encode(x: torch.Tensor, drop_last: int = 0, lengths: np.ndarray | None = None) -> torch.Tensor:
        encoded.append(len(x))
        return plain(x, 1, drop_last, lengths)

    seen: list[tuple[int, int]] = []
    together = target_ranks(encode, head, data, np.arange(120), batch_size=1000, progress=lambda *at: seen.append(at))
    distinct = len(np.unique(sequences, axis=0))
    assert distinct <= 10 and encoded == [distinct] and seen == [(120, 120)]
    encoded.clear(), seen.clear()
    apart = target_ranks(encode, head, data, np.arange(120), batch_size=16, progress=lambda *at: seen.append(at))
    assert sum(encoded) <= 12 and seen == [(48, 120), (96, 120), (120, 120)]
    assert torch.equal(together, apart)
    hidden = model.encode(torch.from_numpy(np.array(data.sequences[17], dtype=np.int64))[None], [Request(1)])[0]
    scores = model.head(1)(hidden)
    assert together[3 * 17] == target_rank(scores, torch.tensor([int(data.samples[3 * 17, 1])]))[0]


def test_evaluation_leaves_no_graph_and_can_be_interrupted(tiny: TaskSequence) -> None:
    method, _ = pair(tiny, 3)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        evaluate(method, tiny.tasks[1], 1, np.arange(30), batch_size=4, progress=stop)
    assert torch.is_grad_enabled() and threading.active_count() == before
    evaluate(method, tiny.tasks[1], 1, np.arange(30))
    assert all(parameter.grad is None for parameter in method.parameters())


def test_no_samples_and_another_head_are_refused(tiny: TaskSequence) -> None:
    method, _ = pair(tiny, 3)
    with pytest.raises(ConfigError, match=r"task 2 \(task 2\): got no samples"):
        evaluate(method, tiny.tasks[1], 1, np.arange(0))
    with pytest.raises(ConfigError, match="task 1: the data have 4 labels, the model 26"):
        evaluate(method, tiny.tasks[2], 0, np.arange(3))
