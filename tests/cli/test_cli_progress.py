"""Progress: the rate, plain lines in a log, bars on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from teracon_fast.cli.progress import LOG_SECONDS, ConsoleObserver, Rate
from teracon_fast.train.log import Step, TaskStart


class Clock:
    """A clock that moves when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_forgets_old_speeds_and_pauses() -> None:
    clock = Clock()
    rate = Rate(half_life=10, clock=clock)
    assert rate.per_second == 0
    rate.add(1000)  # only starts the clock
    for _ in range(5):
        clock.now += 1
        rate.add(50)
    assert rate.per_second == pytest.approx(50)
    rate.pause()
    clock.now += 1000
    rate.add(0)
    assert rate.per_second == pytest.approx(50)
    for _ in range(200):
        clock.now += 1
        rate.add(10)
    assert rate.per_second == pytest.approx(10, rel=1e-3)


def watch(observer: ConsoleObserver, clock: Clock, seconds_a_step: float) -> None:
    """Two tasks' worth of calls, as training makes them."""
    event = {"step": 14, "class_loss": 1.25, "retention_loss": 0.002, "rho": [0.9, 0.05]}
    with observer:
        observer.on_task_start(TaskStart(2, "click [x]", 3, 4, 10, 64, 1, 3))
        for batch in range(3, 10):
            clock.now += seconds_a_step
            observer.on_step(Step(2, 1, batch, 10, 64, event if batch % 2 else None))
        observer.on_evaluate(2, "valid", 5, 10)
        observer.on_evaluate(2, "valid", 10, 10)
        observer.on_valid(
            {
                "task": 2,
                "epoch": 1,
                "metrics": {"mrr@5": 0.5, "hit@1": 0.25, "ndcg@5": 0.5},
                "best": True,
                "class_loss": 2.0,
            }
        )
        test = {"1": {"mrr@5": 0.5, "hit@1": 0.25, "ndcg@5": 0.5}, "2": {"accuracy": 0.75, "hit@1": 0.75}}
        observer.on_task_end({"task": 2, "epochs": 2, "seconds": 12.5, "test": test})
        observer.on_message("done [all]")


def test_log_gets_few_plain_lines() -> None:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=False, width=200)
    watch(ConsoleObserver(console, clock), clock, seconds_a_step=LOG_SECONDS / 2)
    lines = out.getvalue().splitlines()
    assert lines[0] == "T2 of 3: click [x] (10 batches of 64, at most 4 epochs, resuming at epoch 2, batch 4)"
    # Seven steps of half an interval each: three lines, with the rate of one batch of 64 in 15 s.
    assert [line.split("  ")[:3] for line in lines[1:4]] == [
        ["T2 epoch 2/4", "5/10", "4 users/s"],
        ["T2 epoch 2/4", "7/10", "4 users/s"],
        ["T2 epoch 2/4", "9/10", "4 users/s"],
    ]
    assert lines[1].endswith("75 s left in this epoch  step 14: loss 1.2500  retention 2.00e-03  rho 0.900 0.050")
    assert (
        lines[4]
        == "  T2 epoch 2:  loss 2.0000  valid mrr@5 0.5000  hit@1 0.2500  ndcg@5 0.5000  4 users/s  *best so far"
    )
    assert lines[5:] == [
        "  T2 finished: 2 epochs, 12.5 s",
        "    test T1:  mrr@5 0.5000  hit@1 0.2500  ndcg@5 0.5000",
        "    test T2:  accuracy 0.7500",
        "done [all]",
    ]
    assert "\x1b" not in out.getvalue()


def test_other_methods_show_what_they_log() -> None:
    clock, out = Clock(), io.StringIO()
    observer = ConsoleObserver(Console(file=out, force_terminal=False, width=200), clock)
    own = {"class_loss": 2.0, "attention_loss": 0.5, "method": {"open_mask_share": [0.25, 0.5], "free": 0.1}}
    metrics = {"accuracy": 0.75, "hit@1": 0.75}
    with observer:
        observer.on_valid({"task": 2, "epoch": 0, "phase": "train", "metrics": metrics, "best": False, "loss": 2.5, **own})
        observer.on_valid({"task": 2, "epoch": 0, "phase": "retrain", "metrics": metrics, "best": False, "loss": 2.5})
        clock.now += LOG_SECONDS
        observer.on_step(Step(2, 0, 0, 10, 64, {"step": 0, "loss": 0.002}))
    assert out.getvalue().splitlines() == [
        "  T2 epoch 1:  loss 2.0000  attention 0.5000  open mask share 0.25 0.5  free 0.1  valid accuracy 0.7500",
        "  T2 retrain epoch 1:  loss 2.5000  valid accuracy 0.7500",
        "T2 epoch 1  1/10    step 0: loss 2.00e-03",
    ]


def test_terminal_gets_bars_that_go_away() -> None:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=True, highlight=False, width=200)
    observer = ConsoleObserver(console, clock)
    watch(observer, clock, seconds_a_step=0.5)
    text = out.getvalue()
    assert "T2 epoch 2/4" in text and "10/10" in text and "128 users/s" in text
    assert "T2 valid" in text and "test T2:  accuracy 0.7500" in text
    assert not observer._progress.tasks
