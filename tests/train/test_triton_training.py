"""Whole training steps by the Triton kernels: on a GPU where there is one, else, the first of these tests, in the interpreter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from steps import continual_step, t1_step
from tiny_data import write_tiny
from torch import Tensor
from triton_here import require_triton

require_triton()

from teracon_fast import FastTCN, Request  # noqa: E402
from teracon_fast.config import load_config  # noqa: E402
from teracon_fast.methods.base import Precision  # noqa: E402
from teracon_fast.train.loop import make_optimizer  # noqa: E402
from teracon_fast.train.run import train  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
ITEMS, LABELS, LENGTH = 30, [30, 6, 4], 9


def network(tasks: int, backend: str, device: torch.device = DEVICE, channels: int = 8) -> FastTCN:
    torch.manual_seed(tasks)
    model = FastTCN(num_items=ITEMS, channels=channels, labels=LABELS[:tasks], dilations=(1, 2), backend="torch").to(device)
    model.backend = backend
    return model


def batch(users: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, ITEMS, (users, LENGTH), generator=generator)
    pads = torch.randint(0, LENGTH + 1, (users,), generator=generator)
    return x.masked_fill(torch.arange(LENGTH) < pads[:, None], 0), torch.randint(0, LABELS[-1], (users,), generator=generator)


def trained(
    backend: str, steps: int, device: torch.device = DEVICE, channels: int = 8, users: int = 5, precision: Precision = "fp32"
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and sampling rates of steps of task 3 and of task 1, and the weights that they end with."""
    numbers: list[float] = []
    weights: dict[str, Tensor] = {}
    for tasks in (3, 1):
        model, teacher = network(tasks, backend, device, channels), network(2, backend, device, channels).frozen()
        optimizer = make_optimizer(model, 1e-2)
        for step in range(steps):
            x, y = batch(users, step)
            if tasks == 1:
                numbers.append(float(t1_step(model, optimizer, x, 2.0, precision).class_loss))
                continue
            drawn = [torch.arange(1, 3), torch.arange(step + 1)]
            found = continual_step(model, teacher, optimizer, x, y, drawn, [0.4, 0.2], 3.0, 0.7, precision=precision)
            numbers += [float(found.class_loss), float(found.retention_loss), *found.next_rho]
        weights |= {f"{tasks} {name}": value.detach().cpu().clone() for name, value in model.state_dict().items()}
    return numbers, weights


def test_steps_are_those_of_the_torch_backend() -> None:
    (numbers, weights), (expected, wanted) = (trained(backend, 1) for backend in ("triton", "torch"))
    assert numbers == pytest.approx(expected, rel=1e-4)
    for name, value in wanted.items():
        # Adam's first step is lr wherever the gradient is, so weights whose gradient is rounding may differ by two of them.
        assert (weights[name] - value).abs().max() < 2.1e-2 and (weights[name] - value).norm() < 1e-3 * value.norm() + 1e-3, name


@ON_GPU
def test_steps_on_a_gpu_are_those_of_the_cpu() -> None:
    numbers, _ = trained("triton", 4, channels=40, users=50)
    expected, _ = trained("torch", 4, torch.device("cpu"), channels=40, users=50)
    assert numbers == pytest.approx(expected, rel=1e-3)
    low, _ = trained("triton", 4, channels=40, users=50, precision="bf16")
    assert low != numbers and low == pytest.approx(expected, rel=0.05)


@ON_GPU
def test_results_have_the_same_bits_in_every_run_and_under_deterministic_algorithms() -> None:
    first = trained("triton", 2, channels=40, users=50)
    torch.use_deterministic_algorithms(True)
    try:
        second = trained("triton", 2, channels=40, users=50)
    finally:
        torch.use_deterministic_algorithms(False)
    assert first[0] == second[0] and all(torch.equal(first[1][name], value) for name, value in second[1].items())


@contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_GPU
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_not_wait_for_the_gpu(precision: Precision) -> None:
    first, model, teacher = network(1, "triton"), network(3, "triton"), network(2, "triton").frozen()
    optimizers = [make_optimizer(m, 1e-2) for m in (first, model)]

    def steps(seed: int) -> None:
        x, y = batch(50, seed)
        t1_step(first, optimizers[0], x, 2.0, precision)
        drawn = [torch.arange(10), torch.arange(3 + seed)]
        continual_step(model, teacher, optimizers[1], x, y, drawn, [0.2, 0.1], 2.0, 0.7, precision=precision, predictions=True)

    steps(0)  # compiles; makes the optimizer's state
    with no_waits():
        steps(1)


@ON_GPU
def test_work_goes_to_the_current_stream() -> None:
    expected = trained("triton", 2)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert trained("triton", 2)[0] == expected[0]


@ON_GPU
def test_a_model_may_be_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    expected = trained("triton", 2)
    other = trained("triton", 2, torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0 and other[0] == expected[0]


@ON_GPU
def test_encoding_many_users_at_once() -> None:
    model = network(2, "triton")
    x, _ = batch(300)
    (hidden,) = model.encode(x.to(DEVICE), [Request(1)])
    on_cpu = copy.deepcopy(model).cpu()
    on_cpu.backend = "torch"
    torch.testing.assert_close(hidden.cpu(), on_cpu.encode(x, [Request(1)])[0], rtol=1e-3, atol=1e-4)


@ON_GPU
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_task_sequence_from_beginning_to_end(tmp_path: Path, cuda_graphs: bool) -> None:
    write_tiny(tmp_path / "data", tasks=3)
    config = load_config(overrides={
        "data": str(tmp_path / "data"), "run": str(tmp_path / "run"), "device": "cuda", "backend": "triton",
        "cuda_graphs": cuda_graphs, "model.channels": 16, "model.dilations": "[1, 2]", "first.epochs": 2, "later.epochs": 2,
        "later.batch_size": 32, "tensorboard": False,
    })  # fmt: skip
    results = train(config)
    assert len(results.R) == 3 and all(value is not None for value in results.R[2])
