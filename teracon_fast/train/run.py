"""A run: tasks learned one after the other by any method, the matrix R, and resuming after a stop.

    RUN/config.toml           the configuration as it was used
        dataset.json, items.parquet, task{i}/labels.parquet     dictionaries of the data set
        metrics.jsonl, tensorboard/                              see teracon_fast.train.log
        checkpoints/                                             see teracon_fast.train.checkpoint
        results.json                                             R, BWT
        grown.json                                               of a run made by `teracon_fast.train.growth`
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Any

import torch

from teracon_fast.config import RunConfig
from teracon_fast.data import Split, TaskData, check_tasks, split_task
from teracon_fast.data.seeds import derived_seed
from teracon_fast.errors import CheckpointError
from teracon_fast.files import atomic_write
from teracon_fast.methods import EncodeUsers, Method
from teracon_fast.train.checkpoint import RunState, forget_best, load_best, load_task, save_best, save_task
from teracon_fast.train.evaluation import evaluate
from teracon_fast.train.folder import (
    RunStopped,
    StopSignals,
    delete_old_run,
    fingerprint,
    keep_dictionaries,
    locked,
    require_same,
    resolved,
    training_data,
)
from teracon_fast.train.log import Observer, RunLog, Step, TaskStart
from teracon_fast.train.loop import Callbacks, LoopSettings, TaskCheckpoint, TaskSettings, Trainer
from teracon_fast.train.memory import forget_highest_resident, highest_resident_mib
from teracon_fast.train.results import Results, results_of

SAVING_SHARE = 0.05  # of the time that writing checkpoints may take


def train(config: RunConfig, observer: Observer | None = None, fresh: bool = False) -> Results:
    """Train a sequence of tasks into a run folder, or resume the run that is there, to the same bits.

    A finished run is left alone and its results returned; if its data set has gained tasks, those are trained.

    Args:
        config: see `teracon_fast.config`.
        observer: told of the progress.
        fresh: start over; what an earlier run left in the folder is deleted.

    Raises:
        ConfigError: settings or data do not fit, or are not those that the run began with; the folder is in use.
        DivergedError: a loss became NaN or infinite.
        RunStopped: Ctrl-C or SIGTERM; all is saved.
    """
    threads = torch.get_num_threads()
    with locked(config.run), StopSignals() as stop:
        run = Run(config, observer or Observer(), stop, fresh)
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


def cost(method: Method, peak_mib: float) -> dict[str, Any]:
    """What inference on all tasks needs to keep, the highest memory of training, and the device."""
    kept, device = method.inference_state().values(), method.device
    return {
        "parameters": sum(value.numel() for value in kept if value.is_floating_point()),
        "kept_mib": sum(value.numel() * value.element_size() for value in kept) / 2**20,
        "peak_mib": peak_mib,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


class Run(Callbacks):
    """A run in progress: the surroundings of the training loop."""

    def __init__(self, config: RunConfig, observer: Observer, stop: StopSignals, fresh: bool) -> None:
        super().__init__()
        self.observer, self.stop, self.folder = observer, stop, config.run
        self.dataset, self.order = training_data(config)
        saved = None if fresh else RunState.load(self.folder)
        config = resolved(config, saved.fingerprint["exact"] if saved else None)
        begun = saved.begun if saved else 0
        now = fingerprint(config, self.dataset, self.order, begun)
        if saved:
            require_same(now, saved.fingerprint, self.folder, exact=saved.training is not None)
            if saved.torch != torch.__version__:
                observer.on_message(f"begun with torch {saved.torch}, now {torch.__version__}: bits may differ")
        self.config, self.device = config, torch.device(config.device)
        self.state = saved or RunState(now)
        self.last_task = min(config.num_tasks or len(self.order), len(self.order))
        self.splits = [task_split(config, data) for data in self.dataset.tasks[: self.last_task]]
        check_tasks(self.dataset, self.splits)
        self.method = config.new_method(self.dataset.num_items).to(self.device)
        if config.cuda_graphs:
            self.method.enable_graphs()
        if saved is None:
            delete_old_run(self.folder)
        with atomic_write(self.folder / "config.toml", "w") as file:
            file.write(config.to_toml())
        keep_dictionaries(self.dataset, self.order, self.folder, begun)
        self.log_file = RunLog(self.folder, self.state.log_offset, self.state.steps, config.tensorboard)
        self.saved_at = self.logged_at = time.monotonic()
        self.saved_step, self.users, self.saving_took = 0, 0, 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            forget_highest_resident()

    def train(self) -> Results:
        """Train what is left to train."""
        done = len(self.state.tests)
        if done >= self.last_task:
            self.observer.on_message(f"{self.folder}: this run is finished, nothing to train")
            return self.write_results()
        if done:
            load_task(self.folder, done, self.method)
        while len(self.state.tests) < self.last_task:
            trainer, saved = self.begin(len(self.state.tests) + 1)
            try:
                trainer.train(saved)
                self.finish(trainer)
            except RunStopped as stopped:
                self.save_checkpoint(trainer)
                at = trainer.state
                where = f" in task {trainer.task + 1} ({trainer.data.name}), epoch {at.epoch + 1}, batch {at.batch + 1}"
                raise RunStopped(stopped.signum, where) from None
        return self.write_results()

    def begin(self, number: int) -> tuple[Trainer, TaskCheckpoint | None]:
        """Start a task, or restore it from the checkpoint."""
        config, data, method = self.config, self.dataset.tasks[number - 1], self.method
        in_dataset = self.order[number - 1]
        method.configure(config.task_options(in_dataset))
        initial = torch.Generator().manual_seed(derived_seed(config.seed, number, "initial weights"))
        method.start(number - 1, data.num_labels, initial)
        method.draws.manual_seed(derived_seed(config.seed, number, "draws"))
        settings = TaskSettings(**config.for_task(in_dataset).model_dump(exclude={"options"}))
        loop = LoopSettings(config.seed, config.precision, config.parity, config.log_every, config.evaluate_batch_size)
        trainer = Trainer(method, self.dataset, self.splits, settings, loop, self)
        saved, at = None, trainer.state
        if self.state.training is not None:
            try:
                saved = TaskCheckpoint.of_plain(self.state.training)
            except (KeyError, TypeError) as error:
                raise CheckpointError(f"{RunState.file(self.folder)}: not a task in training: {error!r}") from None
            self.state.training, at = None, saved.state
            where = f"epoch {at.epoch + 1}, batch {at.batch + 1}"
            self.observer.on_message(f"resuming task {number} ({data.name}) at {where}")
        self.observer.on_task_start(TaskStart(
            number, data.name, self.last_task, settings.epochs, trainer.num_batches, settings.batch_size, at.epoch, at.batch
        ))  # fmt: skip
        self.saved_at = self.logged_at = time.monotonic()
        self.saved_step, self.users = at.step, 0
        return trainer, saved

    def on_step(self, trainer: Trainer, users: int, event: dict[str, Any] | None) -> None:
        """Log, save when it is time, stop when asked."""
        self.users += users
        at, record = trainer.state, None
        if event is not None:
            now = time.monotonic()
            rate = self.users / max(now - self.logged_at, 1e-9)
            record = self.log_file.write("step", trainer.task + 1, **event, users_per_s=rate)
            self.logged_at, self.users = now, 0
        self.observer.on_step(Step(trainer.task + 1, at.epoch, at.batch - 1, trainer.num_batches, users, record))
        self.save_if_due(trainer)
        self.stop.poll()

    def on_evaluate(self, trainer: Trainer, done: int, total: int) -> None:
        self.show_progress(trainer.task, "valid", done, total)

    def on_epoch_end(self, trainer: Trainer, event: dict[str, Any]) -> None:
        """Log the validation, and the test metrics of the task where they are wanted."""
        if trainer.task + 1 in self.config.test_every_epoch:
            event["test"] = trainer.measure(self.splits[trainer.task].test)
        self.observer.on_valid(self.log_file.write("valid", trainer.task + 1, **event))
        self.state.peak_mib = max(self.state.peak_mib, self.peak_mib())
        self.logged_at = time.monotonic()
        self.save_if_due(trainer)

    def keep_best(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Write the best weights. A run resumed before this point will write the same ones again."""
        save_best(self.folder, trainer.state.phase, trainer.method.changing_state())

    def load_best(self, trainer: Trainer) -> None:
        trainer.method.load_changing_state(load_best(self.folder, trainer.state.phase))

    def show_progress(self, task: int, split: str, done: int, total: int) -> None:
        """Of an evaluation of a task (from 0); a stop signal interrupts it."""
        self.observer.on_evaluate(task + 1, split, done, total)
        self.stop.poll()

    def test(self, task: int, encode: EncodeUsers) -> dict[str, float]:
        """Test metrics of one task (from 0)."""
        data, samples, progress = self.dataset.tasks[task], self.splits[task].test, partial(self.show_progress, task, "test")
        return evaluate(self.method, data, task, samples, self.config.evaluate_batch_size, progress, encode)

    def finish(self, trainer: Trainer) -> None:
        """Save the task's weights, test every task so far with them, and move to the next task."""
        method, at, number = trainer.method, trainer.state, trainer.task + 1
        trainer.count_seconds()
        tests = [self.test(task, encode) for task, encode in method.encoders(range(number)).items()]
        options = self.config.task_options(self.order[number - 1])
        save_task(self.folder, method, {"epoch": at.best_epoch + 1, "options": options})
        fields = {
            "epochs": at.epochs,
            "best_epoch": at.best_epoch,
            "seconds": at.seconds,
            "test": {str(task): metrics for task, metrics in enumerate(tests, 1)},
            **method.summarize(),
        }
        record = self.log_file.write("task_end", number, **fields)
        self.state.tests.append(tests)
        self.state.steps[number] = at.step
        self.state.peak_mib = max(self.state.peak_mib, self.peak_mib())
        if len(self.state.tests) == self.last_task:
            results = self.write_results()
            self.log_file.write("run_end", number, R=results.R, bwt=results.bwt, cost=cost(method, self.state.peak_mib))
        self.save(number, None)
        forget_best(self.folder)
        self.observer.on_task_end(record)

    def peak_mib(self) -> float:
        """Highest memory of this process so far: on a GPU what torch held there, else its resident memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return highest_resident_mib()

    def save_if_due(self, trainer: Trainer) -> None:
        """Save a checkpoint if it is time, but so seldom that saving takes at most SAVING_SHARE of the time."""
        every, wait = self.config.checkpoint_every_steps, max(
            self.config.checkpoint_every_seconds, self.saving_took / SAVING_SHARE
        )
        due = every is not None and trainer.state.step - self.saved_step >= every
        if due or time.monotonic() - self.saved_at >= wait:
            self.save_checkpoint(trainer)

    def save_checkpoint(self, trainer: Trainer) -> None:
        """Save all that the task needs to resume from here."""
        began = time.monotonic()
        self.state.steps[trainer.task + 1] = trainer.state.step
        self.save(trainer.task + 1, trainer.checkpoint().plain())
        self.saved_step, self.saved_at = trainer.state.step, time.monotonic()
        self.saving_took = self.saved_at - began
        trainer.count_seconds(counts=False)

    def save(self, begun: int, training: dict[str, Any] | None) -> None:
        """Replace resume.pt."""
        state = dataclasses.replace(
            self.state, begun=begun, training=training, log_offset=self.log_file.synced_offset(), torch=str(torch.__version__),
            fingerprint=fingerprint(self.config, self.dataset, self.order, begun),
        )  # fmt: skip
        state.save(self.folder)
        self.saved_at = time.monotonic()

    def write_results(self) -> Results:
        """R and BWT of the tasks tested so far, written to results.json."""
        results = results_of(self.dataset, self.state.tests)
        results.write(self.folder)
        return results
