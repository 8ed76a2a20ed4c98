"""Run folders filled with made-up but plausible numbers, for tests of the report and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

NAMES = [
    "next item", "clicks", "purchases of four stars", "gender", "age group", "life_status_of_the_household",
    "coupon redeemed", "income",
]  # fmt: skip


def write_run(folder: Path, tasks: int, epochs: int = 6, steps: int = 120, lowest_cosine: float = 0.55) -> Path:
    """Write config.toml, metrics.jsonl, dataset.json and results.json of a run with `tasks` tasks."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    names = NAMES[:tasks]
    metrics = ["mrr@5" if i < 3 else "accuracy" for i in range(tasks)]
    best = random.uniform(0.02, 0.7, tasks)
    matrix = [[float(best[i] * (1 - 0.03 * random.random() * (j - i))) for i in range(j + 1)] for j in range(tasks)]
    events: list[dict[str, object]] = []
    for task in range(1, tasks + 1):
        past = task - 1
        base = random.uniform(0.004, 0.1, past)
        for epoch in range(epochs):
            for batch in range(steps):
                step = epoch * steps + batch
                decay = 2.5 * np.exp(-step / (steps * 1.5)) + 1.2 + 0.1 * random.standard_normal()
                rho = np.minimum(0.5, base * np.exp(0.15 * random.standard_normal(past)) + 0.4 * np.exp(-batch / 8))
                if step == 0:
                    rho = np.full(past, 0.9)
                event = {"time": 0.0, "event": "step", "task": task, "epoch": epoch, "batch": batch, "step": step}
                event |= {"loss": decay, "class_loss": decay, "scale": 50.0 * (batch + 1) / steps}
                event["users_per_s"] = 900.0 + step
                if past:
                    event |= {"retention_loss": 0.02 * np.exp(0.3 * random.standard_normal()), "rho": rho.tolist()}
                events.append(event)
            value = float(best[past] * (1 - 0.7 * np.exp(-epoch)) + 0.004 * random.standard_normal())
            shown = {metrics[past]: value, "hit@1": value / 2}
            check = {"time": 0.0, "event": "valid", "task": task, "epoch": epoch, "class_loss": decay}
            check |= {"step": steps * (epoch + 1) - 1} | ({"retention_loss": 0.02} if past else {})
            events.append(check | {"metrics": shown, "best": epoch <= 3})
        cosines = random.uniform(lowest_cosine, 1.0, (16, task, task))
        cosines = (cosines + cosines.transpose(0, 2, 1)) / 2
        cosines[:, range(task), range(task)] = 1.0
        test = {str(i + 1): {metrics[i]: matrix[past][i]} for i in range(task)}
        end = {"time": 0.0, "event": "task_end", "task": task, "epochs": epochs, "seconds": 61.5, "test": test}
        events.append(end | {"similarity": cosines.tolist()})
    (folder / "config.toml").write_text('data = "data"\nrun = "run"\n[later]\nc = 5.0\n')
    write_log_and_sizes(folder, names, metrics, events)
    bwt = [100 * (matrix[-1][i] - matrix[i][i]) / matrix[i][i] for i in range(tasks)]
    results = {"metric": metrics, "tasks": names, "R": matrix, "bwt": bwt, "final": {}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_run_of(method: str, folder: Path, losses: list[str], numbers: list[str], phases: list[str]) -> Path:
    """Write a run of three tasks as a method without masks or retention logs it.

    Args:
        losses: named losses of its steps beside `loss`.
        numbers: what it reports of itself after each epoch; "shares" is a list, one per task.
        phases: of each task; epochs start again at 0 in each.
    """
    folder.mkdir(parents=True)
    metrics = ["mrr@5", "mrr@5", "accuracy"]
    events: list[dict[str, object]] = []
    for task, metric in enumerate(metrics, 1):
        for number, phase in enumerate(phases):
            for step in range(20 * number, 20 * number + 20):
                epoch, last = step // 10 - 2 * number, step == 20 * number + 19
                event = {"time": 0.0, "event": "step", "task": task, "epoch": epoch, "batch": step % 10, "step": step}
                named = dict.fromkeys(losses, 2.0 / (1 + step))
                events.append(event | {"loss": sum(named.values()) or 1.0, "users_per_s": 900.0, **named})
                if step % 10 == 9:
                    check = {"time": 0.0, "event": "valid", "task": task, "epoch": epoch, "step": step}
                    check |= {"phase": phase, "metrics": {metric: 0.1 + step / 100}, "best": last} | named
                    shares = {"shares": [0.5] * task} if "shares" in numbers else {}
                    events.append(check | {"method": dict.fromkeys(numbers, 0.25 + number / 2) | shares})
        test = {str(i + 1): {metrics[i]: 0.2} for i in range(task)}
        end = {"time": 0.0, "event": "task_end", "task": task, "epochs": 2 * len(phases), "seconds": 1.5, "test": test}
        events.append(end)
    (folder / "config.toml").write_text(f'data = "data"\nrun = "run"\nmethod = "{method}"\n')
    write_log_and_sizes(folder, NAMES[:3], metrics, events)
    return folder


def write_log_and_sizes(folder: Path, names: list[str], metrics: list[str], events: list[dict[str, object]]) -> None:
    """Write metrics.jsonl and dataset.json."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    kinds = ["next_item"] + ["label"] * (len(names) - 1)
    sizes = {"num_rows": 9, "num_samples": 9}
    labels = [50 if metric == "mrr@5" else 5 for metric in metrics]
    facts = zip(names, kinds, labels, strict=True)
    meta = [{"name": name, "kind": kind, "num_labels": count, **sizes} for name, kind, count in facts]
    dataset = {"format_version": 1, "name": "made up", "length": 20, "num_items": 50, "source": {}, "tasks": meta}
    (folder / "dataset.json").write_text(json.dumps(dataset))
