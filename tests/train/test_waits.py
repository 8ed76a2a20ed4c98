"""Nothing in a training step reads values of a tensor, has a shape that depends on them, or makes a tensor of the host's numbers:
on a GPU each of these would wait for what is queued, or copy from pageable memory.

Steps run on the CPU, watched in two ways. Methods of tensors that read values say who called them. The profiler sees every
operation, those that PyTorch calls from C++ too, and what it sees must lie in a call that is on the list.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from called import Calls
from steps import continual_step, t1_step
from torch import Tensor

import teracon_fast
from teracon_fast import FastTCN, packing
from teracon_fast.data import Batch
from teracon_fast.methods import METHODS, Sizes, StepContext
from teracon_fast.ops.task_masks import torch as masks
from teracon_fast.packing.transfers import HostCopy
from teracon_fast.train.loop import train_step

# Where a step may do so all the same, by file and function.
HOST = "works on tensors that are on the host whatever the model's device"
CPU_ONLY = "a branch for the CPU; other devices take one that does not wait"
ALLOWED = {
    ("ops/pack/*", "*"): HOST,  # tables
    ("packing/*", "*"): HOST,  # and rho of the step before, which waits for that step's masks, not for the step
    ("model/backbone.py", "run"): HOST,  # drawn users, to numpy for the packing
    ("ops/checks.py", "require_range"): CPU_ONLY,
    ("ops/heads.py", "_is_unit"): CPU_ONLY,
    ("ops/rows.py", "gather_taps"): CPU_ONLY,
    ("ops/linear_rank/torch.py", "ranks_among"): CPU_ONLY,
}
# PyTorch's own, where the parameters are on the CPU: on a GPU the kernel reads the number of steps on the device.
ALLOWED_OPERATIONS = {"aten::_fused_adam_"}
MARK = "on the list"

READS = ("__bool__", "__float__", "__int__", "__index__", "cpu", "item", "masked_select", "nonzero", "numpy", "tolist", "unique")
MAKES = ("as_tensor", "from_numpy", "tensor")
WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::masked_select", "aten::equal",
}  # fmt: skip
PACKAGE = Path(teracon_fast.__file__).parent


class Watch:
    """Patched methods; `found` has the calls from places that are not on the list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[str] = []
        for owner, names in ((Tensor, READS), (torch, MAKES)):
            for name in names:
                monkeypatch.setattr(owner, name, self._watched(name, getattr(owner, name)))

    def _watched(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            place = _place()
            if place is None:
                return plain(*arguments, **options)
            if not _allowed(place):
                self.found.append(f"{name} in {place[1]} of {place[0]}")
            with torch.profiler.record_function(MARK):
                return plain(*arguments, **options)

        return call

    def indexed(self, name: str, arguments: tuple[Any, ...]) -> None:
        """A list becomes a tensor, which is copied to the device; where a mask is true must be looked for."""
        if name not in ("__getitem__", "__setitem__"):
            return
        index = arguments[1]
        for part in index if isinstance(index, tuple) else (index,):
            truth = isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)
            if truth or isinstance(part, (list, range, np.ndarray)):
                place = _place()
                if place is not None and not _allowed(place):
                    self.found.append(f"index {type(part).__name__} in {place[1]} of {place[0]}")


def _allowed(place: tuple[str, str]) -> bool:
    folder = place[0].rpartition("/")[0]
    return place in ALLOWED or (f"{folder}/*", "*") in ALLOWED


def _place() -> tuple[str, str] | None:
    """File and function of the package that the call comes from, past PyTorch's own; None where this file calls."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path == Path(__file__):
            return None
        if PACKAGE in path.parents and not frame.f_code.co_name.startswith("<"):
            return path.relative_to(PACKAGE).as_posix(), frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return None


def waiting(run: Callable[[], Any], watch: Watch) -> list[str]:
    """What waits in a run."""
    watch.found.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = list(profile.events() or ())
    assert any(event.name == "aten::addmm" for event in events), "the profiler has seen nothing"
    return watch.found + [
        f"{event.name} under {' < '.join(above)}"
        for event in events
        if event.name in WAITS and not ({*(above := list(_above(event)))} & {MARK, *ALLOWED_OPERATIONS})
    ]


def _above(event: Any) -> Iterator[str]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    watch = Watch(monkeypatch)
    with Calls(watch.indexed):
        yield watch


def steps(mask: str, tasks: int, student_mask: Any, precision: Any) -> Callable[[], None]:
    """A step of task 1 and one of the last of some tasks, each after the first, which makes what is kept."""
    labels = [50, 7, 4][:tasks]
    shape: dict[str, Any] = {"num_items": 50, "channels": 8, "dilations": (1, 2), "mask": mask, "backend": "torch"}
    model, teacher = FastTCN(labels=labels, **shape), FastTCN(labels=labels[:-1], **shape).frozen()
    x, y = torch.randint(0, 50, (20, 9)), torch.randint(0, labels[-1], (20,))
    x[:10, :4] = 0
    lengths, users = packing.real_lengths(x), [torch.arange(4 + j) for j in range(tasks - 1)]
    # Not `make_optimizer`, whose sparse gradients are the CPU's.
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def run(rho: Sequence[float] = (0.5, 0.25)) -> None:
        continual_step(
            model, teacher, optimizer, x, y, users, rho[: tasks - 1], 3.0, 0.7, student_mask, 6.0, precision, lengths, True
        )
        t1_step(model, optimizer, x, 3.0, precision, lengths, True)

    run()
    return run


@pytest.mark.parametrize(
    ("mask", "tasks", "student_mask", "precision"),
    [("relation", 3, "past", "fp32"), ("relation", 2, "current", "bf16"), ("none", 3, "past", "fp32"),
     ("positive_only", 3, "current", "fp32")],
)  # fmt: skip
def test_no_step_waits(mask: str, tasks: int, student_mask: str, precision: str, watch: Watch) -> None:
    assert waiting(steps(mask, tasks, student_mask, precision), watch) == []


@pytest.mark.parametrize("name", METHODS)
def test_no_step_of_a_method_waits(name: str, watch: Watch) -> None:
    """Of the first task and the second, in every phase, each after a first step."""
    method = METHODS[name](Sizes(50, channels=8, dilations=(1, 2), backend="torch"))
    x = torch.randint(0, 50, (20, 9))
    x[:10, :4] = 0
    first = Batch(x, x[:, -1], packing.real_lengths(x))
    second = first._replace(y=torch.randint(0, 7, (20,)))
    for task, batch in enumerate((first, second)):
        method.start(task, (50, 7)[task])
        for phase in method.phases():
            optimizer = torch.optim.Adam(method.begin_phase(phase), lr=1e-3, fused=True)

            def step(optimizer: torch.optim.Optimizer = optimizer, batch: Batch = batch) -> None:
                train_step(method, optimizer, batch, StepContext(1, 3.0, predictions=True, companions={0: first}))

            step()
            assert waiting(step, watch) == [], (task, phase)
            method.end_phase(phase)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("float(mask.sum())", "__float__ in added of masks.py"),
        ("mask.sum().tolist()", "tolist in added of masks.py"),
        ("mask.cpu()", "cpu in added of masks.py"),
        ("mask.nonzero()", "nonzero in added of masks.py"),
        ("mask[mask > 2]", "index Tensor in added of masks.py"),
        ("mask[:, [0]]", "index list in added of masks.py"),
        ("torch.tensor([1.0])", "tensor in added of masks.py"),
        ("torch.ops.aten.item(mask.sum())", "aten::_local_scalar_dense under aten::item"),
        ("torch.unique(mask)", "aten::_unique2 under "),
        ("torch.masked_select(mask, mask > 2)", "aten::masked_select under "),
        ("torch.equal(mask, mask)", "aten::equal under "),
    ],
)
def test_one_that_did_would_be_seen(code: str, expected: str, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code in the middle of a step, as if it were of the package."""
    scope: dict[str, Any] = {"torch": torch}
    exec(compile(f"def added(mask):\n    {code}", str(PACKAGE / "masks.py"), "exec"), scope)
    plain = torch.baddbmm

    def with_more(*arguments: Any) -> Tensor:
        mask = plain(*arguments)
        scope["added"](mask.detach())
        return mask

    run = steps("relation", 3, "past", "fp32")
    monkeypatch.setattr(torch, "baddbmm", with_more)
    found = waiting(run, watch)
    assert found and found[0].startswith(expected)


def test_the_next_rates_are_on_their_way_before_the_encoder_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[str] = []

    def recorded(owner: Any, name: str) -> None:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, **options: queued.append(name) or plain(*arguments, **options))

    run = steps("relation", 3, "past", "fp32")
    for owner, name in ((FastTCN, "step_masks"), (HostCopy, "__init__"), (FastTCN, "run"), (FastTCN, "class_loss")):
        recorded(owner, name)
    run()
    assert queued[:5] == ["step_masks", "__init__", "run", "run", "class_loss"]


def test_columns_are_made_once_for_a_device(watch: Watch) -> None:
    """The numbers of the host that masks need: the first call makes them."""
    parts = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(2, 3)
    masks._kept_columns.cache_clear()
    masks.relation_masks(*parts, 1.0)
    assert watch.found == ["tensor in _columns of ops/task_masks/torch.py"] * 3
    masks.relation_masks(*parts, 2.0)
    assert len(watch.found) == 3


def test_watching_leaves_tensors_as_they_were() -> None:
    with pytest.MonkeyPatch.context() as patch, Calls(Watch(patch).indexed):
        assert float(torch.ones(2)[1]) == 1
    assert torch.tensor([torch.tensor(1.0), 2.0]).tolist() == [1, 2]
