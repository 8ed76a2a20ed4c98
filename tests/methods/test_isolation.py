"""Methods that give each task weights of its own: nothing is forgotten; and the first task is plain training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from learn import learn_task, metrics_of
from tiny_data import write_tiny

from teracon_fast.data import TaskSequence
from teracon_fast.methods import MTL, Conure, FineAll, Method, PeterRec, Piggyback, SinMo, Sizes
from teracon_fast.train.loop import TaskSettings
from teracon_fast.train.metrics import headline

KINDS: dict[str, Callable[[Sizes], Method]] = {
    "sinmo": SinMo,
    "fine_all": FineAll,
    "mtl": MTL,
    "peterrec": PeterRec,
    "piggyback": lambda sizes: Piggyback(sizes, mask_lr=1e-3),
    "conure": Conure,
    "conure, pre-activation": lambda sizes: Conure(sizes, block="pre-activation", pruned="zero"),
}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> TaskSequence:
    return write_tiny(tmp_path_factory.mktemp("isolation") / "four", tasks=4)


@pytest.mark.parametrize("kind", KINDS)
def test_earlier_tasks_keep_their_bits(kind: str, four: TaskSequence) -> None:
    """States, logits and metrics of every task after each later one, so BWT is exactly 0; also restored from the state dict."""
    sizes = Sizes(four.num_items, channels=16, dilations=(1, 2))
    method, x = KINDS[kind](sizes), torch.from_numpy(four.tasks[0].sequences[:70].astype("int64"))
    first: list[tuple[torch.Tensor, torch.Tensor, dict[str, float]]] = []

    def found(method: Method, task: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        state = method.encode(x, task)
        return state, method.head(task)(state).detach(), metrics_of(method, four, task)

    for task in range(4):
        epochs = learn_task(method, four, task, TaskSettings(lr=5e-3, batch_size=32, epochs=4 if task else 8))
        assert epochs[-1]["class_loss"] < epochs[0]["class_loss"]
        first.append(found(method, task))
    again = KINDS[kind](sizes)
    again.restore(method.labels, method.state_dict())
    assert again.labels == [data.num_labels for data in four.tasks]
    for task in range(4):
        for one in (method, again):
            states, logits, metrics = found(one, task)
            assert torch.equal(states, first[task][0]) and torch.equal(logits, first[task][1]) and metrics == first[task][2]
    for task in (0, 1):
        assert first[task][2][headline(four.tasks[task].num_labels)] > 0.2, "better than chance, which is 0.08"


@pytest.mark.parametrize("kind", [FineAll, MTL, PeterRec, Piggyback, lambda sizes: Conure(sizes, pruning=0)])
def test_task_1_is_plain_training(kind: Callable[[Sizes], Method], tiny: TaskSequence, sizes: Sizes) -> None:
    """Conure with nothing pruned: a network without masks, to the last bit."""
    method, plain, settings = kind(sizes), SinMo(sizes), TaskSettings(lr=5e-3, batch_size=32, epochs=4, patience=2)
    logged = [learn_task(one, tiny, 0, settings) for one in (method, plain)]
    for one, other in zip(*logged, strict=True):
        assert {**one, "method": {}} == {**other, "method": {}}
    x = torch.from_numpy(tiny.tasks[0].sequences[:80].astype("int64"))
    assert torch.equal(method.encode(x, 0), plain.encode(x, 0)) and torch.equal(method.head(0).weight, plain.head(0).weight)
