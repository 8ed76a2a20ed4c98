"""A sequence of tasks, learnt one after the other: teacher and student, the matrix R, going on after a stop.

    RUN/config.toml           the configuration as it was used
        dataset.json, items.parquet, task{i}/labels.parquet     dictionaries of the data set
        metrics.jsonl, tensorboard/                              see teracon_fast.train.log
        checkpoints/task{i}.safetensors                          best weights of task i, with all tasks before it
        checkpoints/resume.pt                                    where an interrupted run goes on
        results.json                                             R, BWT
        grown.json                                               of a run made by `teracon_fast.train.growth`
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from teracon_fast.config import RunConfig
from teracon_fast.data import check_tasks, open_dataset, split_task
from teracon_fast.files import atomic_write
from teracon_fast.methods.teracon_graphs import StepGraphs
from teracon_fast.model.checkpoints import load_model, load_state, save_model, save_state
from teracon_fast.model.fast_tcn import FastTCN
from teracon_fast.ops.task_masks import similarity
from teracon_fast.train.evaluation import evaluate
from teracon_fast.train.folder import (
    RunStopped,
    StopSignals,
    delete_old_run,
    keep_dictionaries,
    locked,
    require_same,
    resolved,
    settings,
)
from teracon_fast.train.log import Observer, RunLog, Step, TaskStart
from teracon_fast.train.loop import FIRST_RHO, Losses, Position, TaskTraining, make_optimizer, train_task
from teracon_fast.train.results import Results, derived_seed, results_of

if TYPE_CHECKING:
    from teracon_fast.data import Split, TaskData


def train(config: RunConfig, observer: Observer | None = None, fresh: bool = False) -> Results:
    """Train a sequence of tasks into a run folder, or go on with the run that is there, to the same bits.

    A finished run is left alone and its results returned; if its data set has gained tasks, those are trained.

    Args:
        config: see `teracon_fast.config`.
        observer: told of the progress.
        fresh: begin anew; what an earlier run left in the folder is deleted.

    Raises:
        ConfigError: settings or data do not fit, or are not those that the run began with; the folder is in use.
        DivergedError: a loss became NaN or infinite.
        RunStopped: Ctrl-C or SIGTERM; all is saved.
    """
    threads = torch.get_num_threads()
    with locked(config.run), StopSignals() as stop:
        run = _Run(config, observer or Observer(), stop, fresh)
        try:
            assert run.config.threads is not None
            torch.set_num_threads(run.config.threads)
            return run.train()
        finally:
            torch.set_num_threads(threads)
            run.log_file.close()


def task_split(config: RunConfig, data: TaskData) -> Split:
    """The samples that a run trains, validates and tests a task on."""
    return split_task(data, by=config.split_by, seed=config.seed)


class _Run:
    """A run in progress: the host of `train_task`."""

    def __init__(self, config: RunConfig, observer: Observer, stop: StopSignals, fresh: bool) -> None:
        self.observer, self.stop, self.folder = observer, stop, config.run
        self.dataset = open_dataset(config.data)
        self.state_file = self.folder / "checkpoints" / "resume.pt"
        if fresh or not self.state_file.exists():
            delete_old_run(self.folder)
        self.saved = load_state(self.state_file) if self.state_file.exists() else None
        begun = self.saved["begun"] if self.saved else 0
        config = resolved(config, self.saved["settings"] if self.saved else settings(config, self.dataset, 0))
        if self.saved:
            require_same(settings(config, self.dataset, begun), self.saved["settings"], self.folder)
            if self.saved["torch"] != torch.__version__:
                observer.on_message(f"begun with torch {self.saved['torch']}, now {torch.__version__}: bits may differ")
        self.config, self.device = config, torch.device(config.device)
        self.last_task = min(config.num_tasks or len(self.dataset.tasks), len(self.dataset.tasks))
        self.splits = [task_split(config, data) for data in self.dataset.tasks[: self.last_task]]
        check_tasks(self.dataset, self.splits)
        with atomic_write(self.folder / "config.toml", "w") as file:
            file.write(config.to_toml())
        keep_dictionaries(self.dataset, self.folder, begun)
        self.tests: list[list[dict[str, float]]] = self.saved["tests"] if self.saved else []
        self.steps: dict[int, int] = self.saved["steps"] if self.saved else {}
        offset = self.saved["log_offset"] if self.saved else 0
        self.log_file = RunLog(self.folder, offset, self.steps, config.tensorboard)
        self.saved_at = self.logged_at = self.counted_at = time.monotonic()
        self.saved_step = self.users = 0

    def train(self) -> Results:
        """Train what is left to train."""
        if len(self.tests) >= self.last_task:
            self.observer.on_message(f"{self.folder}: this run is finished, nothing to train")
        while len(self.tests) < self.last_task:
            task = self.begin(len(self.tests) + 1)
            try:
                train_task(task, self)
                self.finish(task)
            except RunStopped as stopped:
                self.checkpoint(task)
                at = task.position
                where = f" in task {task.number}, epoch {at.epoch}, batch {at.batch}"
                raise RunStopped(stopped.signum, where) from None
        return self.results()

    def begin(self, number: int) -> TaskTraining:
        """Teacher, student, optimiser and position of a task: fresh, or as the checkpoint has them."""
        config, data = self.config.for_task(number), self.dataset.tasks[number - 1]
        draws, initial = torch.Generator(), torch.Generator()
        draws.manual_seed(derived_seed(self.config.seed, number, "draws"))
        initial.manual_seed(derived_seed(self.config.seed, number, "initial weights"))
        teacher = None if number == 1 else self.load_best(number - 1).frozen()
        model = self.first_model(initial) if teacher is None else teacher.extended(data.num_labels, initial)
        position = Position(rho=[FIRST_RHO] * (number - 1))
        optimizer = make_optimizer(model.to(self.device), config.lr)
        if self.saved and self.saved["position"] is not None:
            model.load_state_dict(self.saved["model"])
            optimizer.load_state_dict(self.saved["optimizer"])
            draws.set_state(self.saved["draws"])
            position = Position(**self.saved["position"])
            self.observer.on_message(f"going on with task {number} at epoch {position.epoch}, batch {position.batch}")
        self.saved = None
        graphs = None
        if self.config.cuda_graphs:
            graphs = StepGraphs(model, teacher, config.alpha, self.config.student_mask, self.config.precision)
        split = self.splits[number - 1]
        batches = math.ceil(len(split.train) / config.batch_size)
        self.observer.on_task_start(TaskStart(
            number, data.name, self.last_task, config.epochs, batches, config.batch_size, position.epoch, position.batch
        ))  # fmt: skip
        self.saved_at = self.logged_at = self.counted_at = time.monotonic()
        self.saved_step, self.users = position.step, 0
        order_seed = derived_seed(self.config.seed, number, "order")
        return TaskTraining(
            number, config, data, split, order_seed, model, teacher, optimizer, draws, position, Losses(number),
            self.config.precision, self.config.sampling, self.config.student_mask, self.config.parity, self.config.log_every,
            graphs,
        )  # fmt: skip

    def first_model(self, generator: torch.Generator) -> FastTCN:
        """The network of task 1."""
        shape = self.config.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            return FastTCN(
                num_items=self.dataset.num_items,
                channels=shape.channels,
                labels=[self.dataset.tasks[0].num_labels],
                dilations=shape.dilations,
                kernel_size=shape.kernel_size,
                mask=self.config.mask,
                backend=self.config.backend,
                algorithm=self.config.algorithm,
            )

    def after_step(self, task: TaskTraining, users: int, event: dict[str, Any] | None) -> None:
        """Log, save when it is time, stop when asked."""
        self.users += users
        at, record = task.position, None
        if event is not None:
            now = time.monotonic()
            loss = event["class_loss"] + task.config.alpha * event.get("retention_loss", 0.0)
            rate = self.users / max(now - self.logged_at, 1e-9)
            record = self.log_file.write("step", task.number, **event, loss=loss, users_per_s=rate)
            self.logged_at, self.users = now, 0
        batches = math.ceil(len(task.split.train) / task.config.batch_size)
        self.observer.on_step(Step(task.number, at.epoch, at.batch - 1, batches, users, record))
        every = self.config.checkpoint_every_steps
        due = every is not None and at.step - self.saved_step >= every
        if due or time.monotonic() - self.saved_at >= self.config.checkpoint_every_seconds:
            self.checkpoint(task)
        self.stop.poll()

    def validate(self, task: TaskTraining) -> dict[str, float]:
        """Metrics on the validation samples."""
        metrics = self.measure(task.model, task.number, "valid", task.config.s_max)
        self.logged_at = time.monotonic()
        return metrics

    def measure(self, model: FastTCN, number: int, part: Literal["valid", "test"], s: float) -> dict[str, float]:
        """Metrics of one task on its validation or test samples; a stop signal interrupts it."""

        def progress(done: int, total: int) -> None:
            self.observer.on_evaluate(number, part, done, total)
            self.stop.poll()

        data, samples = self.dataset.tasks[number - 1], getattr(self.splits[number - 1], part)
        return evaluate(model, data, number - 1, samples, s, self.config.evaluate_batch_size, progress)

    def keep_best(self, task: TaskTraining, metrics: dict[str, float]) -> None:
        """Write the best weights of the task. A run resumed before this point will write the same ones again."""
        notes = {"task": task.number, "epoch": task.position.epoch, "s_max": task.config.s_max, "valid": metrics}
        save_model(task.model, self.best_file(task.number), notes)

    def load_best(self, number: int) -> FastTCN:
        """The model after a task."""
        return load_model(self.best_file(number), self.device, self.config.backend, self.config.algorithm)

    def best_file(self, number: int) -> Path:
        """Where the best weights of a task are."""
        return self.folder / "checkpoints" / f"task{number}.safetensors"

    def log(self, event: str, task: TaskTraining, **fields: Any) -> None:
        """Log a validation."""
        self.observer.on_valid(self.log_file.write(event, task.number, **fields))

    def finish(self, task: TaskTraining) -> None:
        """Test every task so far with the best weights, and move to the next task."""
        model, s, at = self.load_best(task.number), task.config.s_max, task.position
        tests = [self.measure(model, number, "test", s) for number in range(1, task.number + 1)]
        with torch.no_grad():
            masks = model.masks(s)
            cosines = similarity(masks[:, :, None], masks[:, None])
        self.count_seconds(at)
        fields = {
            "epochs": at.epoch,
            "best_epoch": at.best_epoch,
            "seconds": at.seconds,
            "test": {str(number): metrics for number, metrics in enumerate(tests, 1)},
            "similarity": cosines.tolist(),
        }
        record = self.log_file.write("task_end", task.number, **fields)
        self.tests.append(tests)
        self.steps[task.number] = at.step
        if len(self.tests) == self.last_task:
            results = self.results()
            self.log_file.write("run_end", task.number, R=results.R, bwt=results.bwt)
            with atomic_write(self.folder / "results.json", "w") as file:
                file.write(json.dumps(dataclasses.asdict(results), indent=2) + "\n")
        self.save(begun=task.number, position=None)
        self.observer.on_task_end(record)

    def checkpoint(self, task: TaskTraining) -> None:
        """Save all that the task needs to go on from here."""
        task.losses.read(task.position)
        self.count_seconds(task.position)
        self.steps[task.number] = task.position.step
        self.save(
            begun=task.number,
            position=dataclasses.asdict(task.position),
            model=task.model.state_dict(),
            optimizer=task.optimizer.state_dict(),
            draws=task.draws.get_state(),
        )
        self.saved_step = task.position.step

    def save(self, begun: int, **fields: Any) -> None:
        """Replace resume.pt."""
        save_state(self.state_file, {
            "settings": settings(self.config, self.dataset, begun), "begun": begun, "tests": self.tests,
            "steps": self.steps, "log_offset": self.log_file.synced_offset(), "torch": str(torch.__version__), **fields,
        })  # fmt: skip
        self.saved_at = time.monotonic()

    def count_seconds(self, at: Position) -> None:
        """Add the time since the last call to the task's."""
        now = time.monotonic()
        at.seconds, self.counted_at = at.seconds + now - self.counted_at, now

    def results(self) -> Results:
        """R and BWT of the tasks tested so far."""
        return results_of(self.dataset, self.tests)
