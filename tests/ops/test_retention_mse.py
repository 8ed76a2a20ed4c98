"""The retention loss of heads: exactness of both forms, gradients, several tasks, inputs that must be refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import INSTRUCTION_SETS, passes_under
from torch import Tensor

from teracon_fast import env_report, ops
from teracon_fast.errors import ShapeError
from teracon_fast.ops import heads as _heads
from teracon_fast.ops.backends import BackendError
from teracon_fast.ops.retention_mse import cpu as _cpu_retention_mse
from teracon_fast.ops.retention_mse.api import _retention_mse
from teracon_fast.reference import retention_loss

# Plain PyTorch and the compiled kernels where they are; Triton's have test_triton_backend.py and tests/kernels.
BACKENDS = [name for name in env_report()["backends"]["retention_mse"] if name != "triton"]
COMPILED = pytest.mark.skipif("cpu" not in BACKENDS, reason="this installation has no compiled extension")
FORMS = [(backend, form) for backend in BACKENDS for form in (("direct", "gram") if backend == "cpu" else ("direct",))]


def pair(users: int, labels: int, channels: int, apart: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Student (needing gradients) and teacher, `apart` from each other: hidden, weight, bias of each."""
    student = [torch.randn(users, channels), torch.randn(labels, channels), torch.randn(labels)]
    teacher = [value + apart * torch.randn_like(value) for value in student]
    return [v.to(dtype).requires_grad_() for v in student] + [v.to(dtype) for v in teacher]


def naive(hs: Tensor, ws: Tensor, bs: Tensor, ht: Tensor, wt: Tensor, bt: Tensor) -> Tensor:
    """Eager PyTorch in the dtype of the hidden states."""
    student, teacher = F.linear(hs, ws.to(hs.dtype), bs.to(hs.dtype)), F.linear(ht, wt.to(hs.dtype), bt.to(hs.dtype))
    wide = torch.promote_types(hs.dtype, torch.float32)
    return F.mse_loss(student.to(wide), teacher.to(wide))


def with_gradients(loss: Tensor, values: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, values[:3])]


# Users: one, fewer than a panel, several panels, more than are taken at once. Labels: fewer than a tile, several blocks.
SIZES = [(1, 1, 1), (3, 7, 5), (33, 14, 16), (26, 1003, 64), (300, 700, 33)]


@pytest.mark.parametrize(("backend", "form"), FORMS)
@pytest.mark.parametrize(("users", "labels", "channels"), SIZES)
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-5])
def test_error_is_that_of_the_same_arithmetic_in_the_same_dtype(
    backend: str, form: str, users: int, labels: int, channels: int, apart: float
) -> None:
    """err(op, exact) <= 2 err(naive, exact), loss and every gradient, also where student and teacher nearly agree."""
    values = pair(users, labels, channels, apart)
    got = with_gradients(ops.retention_mse(*values, form=form, backend=backend), values)
    plain = with_gradients(naive(*values), values)
    wide = [v.detach().double().requires_grad_(i < 3) for i, v in enumerate(values)]
    for g, p, t in zip(got, plain, with_gradients(naive(*wide), wide), strict=True):
        assert g.dtype == torch.float32
        assert (g.double() - t).norm() <= 2 * (p.double() - t).norm() + 3e-7 * t.norm()


@pytest.mark.parametrize(("backend", "form"), FORMS)
@pytest.mark.parametrize(("users", "labels", "channels"), SIZES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_error_in_bfloat16_is_that_of_eager_bfloat16(
    backend: str, form: str, users: int, labels: int, channels: int, weights: torch.dtype
) -> None:
    values = pair(users, labels, channels, 0.3)
    values = [v.detach().to(torch.bfloat16 if i % 3 == 0 else weights).requires_grad_(i < 3) for i, v in enumerate(values)]
    got = with_gradients(ops.retention_mse(*values, form=form, backend=backend), values)
    assert [g.dtype for g in got] == [torch.float32, torch.bfloat16, weights, weights]
    plain = with_gradients(naive(*values), values)
    wide = [v.detach().double().requires_grad_(i < 3) for i, v in enumerate(values)]
    for g, p, t in zip(got, plain, with_gradients(naive(*wide), wide), strict=True):
        assert (g.double() - t).norm() <= 2 * (p.double() - t).norm() + 1e-2 * t.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_tasks_weigh_by_rho_and_spare_the_teacher(backend: str) -> None:
    tasks = [pair(3, 5, 4, 1.0), pair(2, 7, 4, 1.0), pair(9, 300, 4, 1.0)]
    rho = [0.3, 0.1, 0.07]
    everything = [list(part) for part in zip(*tasks, strict=True)]
    for teacher in (t for part in everything[3:] for t in part):
        teacher.requires_grad_()
    loss = ops.retention_mse(*everything, rho, backend=backend)
    logits = [[F.linear(*task[k : k + 3]) for task in tasks] for k in (0, 3)]
    torch.testing.assert_close(loss, retention_loss(logits[0], logits[1], rho), rtol=1e-6, atol=0)
    torch.testing.assert_close(ops.retention_mse(*everything, torch.tensor(rho), scale=2.0, backend=backend), 2 * loss)
    loss.backward()
    assert all(t.grad is None for part in everything[3:] for t in part)
    for task, rate in zip(tasks, rho, strict=True):
        expected = torch.autograd.grad(rate / sum(rho) * naive(*task), task[:3])
        for t, e in zip(task[:3], expected, strict=True):
            torch.testing.assert_close(t.grad, e, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_rows_and_weights_that_stay_on_the_device_change_nothing(backend: str) -> None:
    tasks, rho = [pair(3, 5, 4, 1.0), pair(20, 300, 4, 1.0)], [0.3, 0.1]
    padded = [
        [torch.cat([v, torch.randn(9, 4)]).detach().requires_grad_(i == 0) if i % 3 == 0 else v for i, v in enumerate(task)]
        for task in tasks
    ]
    whole, padding = ([list(part) for part in zip(*some, strict=True)] for some in (tasks, padded))
    loss = ops.retention_mse(*whole, rho, scale=0.7, form="direct", backend=backend)
    valid = torch.tensor([3, 20], dtype=torch.int32)
    same = ops.retention_mse(*padding, torch.tensor(rho), scale=0.7, form="direct", valid=valid, backend=backend)
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=0)
    for task, more in zip(tasks, padded, strict=True):
        expected = torch.autograd.grad(loss, task[:3], retain_graph=True)
        d_hidden, *got = torch.autograd.grad(same, more[:3], retain_graph=True)
        assert not d_hidden[len(task[0]) :].any()
        for g, e in zip((d_hidden[: len(task[0])], *got), expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-7)
    with pytest.raises(ShapeError, match="past tasks"):
        ops.retention_mse(*padding, rho, valid=valid[:1], backend=backend)


def test_a_unit_gradient_is_known_where_its_value_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU looking would wait for it; a pass over the gradients, to multiply them by one, is spared all the same."""
    tasks = [pair(3, 5, 4, 1.0), pair(20, 300, 4, 1.0)]
    parameters, whole = [v for task in tasks for v in task[:3]], [list(part) for part in zip(*tasks, strict=True)]
    found: list[bool] = []
    monkeypatch.setattr(_heads, "_is_unit", lambda grad: found.append(grad is _heads._UNITS.get(grad.device)) or found[-1])

    def gradients(start: Tensor | None, times: float) -> tuple[Tensor, ...]:
        loss = times * torch.ones((), requires_grad=True) + ops.retention_mse(*whole, backend="torch")
        return torch.autograd.grad(loss, parameters, start)

    unit = ops.unit_gradient(torch.zeros(()))
    assert unit is ops.unit_gradient(torch.zeros(())) and float(unit) == 1.0
    kept, multiplied = gradients(unit, 2.0), gradients(torch.ones(()), 2.0)
    assert found == [True, True, False, False]
    assert all(torch.equal(one, other) for one, other in zip(kept, multiplied, strict=True))
    assert ops.unit_gradient(torch.zeros((), dtype=torch.float64)).dtype == torch.float64


def test_gradcheck() -> None:
    values = pair(3, 7, 4, 1.0, torch.float64)
    torch.autograd.gradcheck(lambda *v: ops.retention_mse(*v, *values[3:], scale=0.7), values[:3])


@pytest.mark.parametrize(("backend", "form"), FORMS)
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_asked_for(backend: str, form: str, needed: tuple[bool, ...]) -> None:
    values = pair(20, 30, 6, 1.0)
    expected = torch.autograd.grad(naive(*values), values[:3])[needed.index(True)]
    values = [v.detach().requires_grad_(n) for v, n in zip(values, (*needed, False, False, False), strict=True)]
    (3 * ops.retention_mse(*values, form=form, backend=backend)).backward()
    torch.testing.assert_close(values[needed.index(True)].grad, 3 * expected, rtol=1e-4, atol=1e-6)
    assert [v.grad is not None for v in values] == [*needed, False, False, False]


@pytest.mark.parametrize(("backend", "form"), FORMS)
def test_nothing_but_the_loss_without_gradients(backend: str, form: str) -> None:
    values = [v.detach() for v in pair(20, 300, 6, 1.0)]
    torch.testing.assert_close(ops.retention_mse(*values, form=form, backend=backend), naive(*values))
    outputs = _retention_mse(*values, torch.tensor(1.0), None, form, backend, False, False, False, False)
    assert [t.numel() for t in outputs] == [1, 0, 0, 0]
    same = ops.retention_mse(*values[:3], *values[:3], form=form, backend=backend)
    assert float(same) == 0.0


@pytest.mark.parametrize(("backend", "form"), FORMS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_same_bits_from_run_to_run(backend: str, form: str, threads: int) -> None:
    values = pair(40, 900, 24, 0.1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [with_gradients(ops.retention_mse(*values, form=form, backend=backend), values) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    for got, expected in zip(runs[0], with_gradients(naive(*values), values), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("backend", "form"), FORMS)
def test_layouts_that_are_not_contiguous(backend: str, form: str) -> None:
    values = pair(20, 30, 6, 0.1)
    expected = with_gradients(ops.retention_mse(*values, form=form, backend=backend), values)
    strided = [torch.stack([v, -v], -1)[..., 0].detach().requires_grad_(i < 3) for i, v in enumerate(values)]
    assert not any(v.is_contiguous() for v in strided)
    for g, e in zip(with_gradients(ops.retention_mse(*strided, form=form, backend=backend), strided), expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_not_hidden(backend: str, value: float) -> None:
    for i in range(6):
        values = [v.detach().clone() for v in pair(5, 200, 6, 0.1)]
        values[i].view(-1)[-1] = value
        assert not ops.retention_mse(*values, form="direct", backend=backend).isfinite()


@COMPILED
def test_the_form_that_measures_faster_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _cpu_retention_mse.gram_is_faster(256, 256, torch.float32)
    assert _cpu_retention_mse.gram_is_faster(512, 256, torch.float32)
    assert not _cpu_retention_mse.gram_is_faster(512, 256, torch.bfloat16)
    few, many = pair(4, 40, 8, 0.1), pair(40, 40, 8, 0.1)
    called = []
    by_gram = _cpu_retention_mse._by_gram
    monkeypatch.setattr(_cpu_retention_mse, "_by_gram", lambda *a: called.append(len(a[0].hidden)) or by_gram(*a))
    ops.retention_mse(*few, backend="cpu"), ops.retention_mse(*many, backend="cpu")
    assert called == [40]


@COMPILED
def test_the_gram_matrix_of_a_teacher_is_computed_once() -> None:
    weight = torch.randn(5000, 8)
    gram = _cpu_retention_mse.teacher_gram(weight)
    torch.testing.assert_close(gram, weight.double().t() @ weight.double(), rtol=1e-6, atol=1e-3)
    assert _cpu_retention_mse.teacher_gram(weight) is gram
    weight[0] += 1.0  # one that changes all the same is not taken from memory
    changed = _cpu_retention_mse.teacher_gram(weight)
    torch.testing.assert_close(changed, weight.double().t() @ weight.double(), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize(("backend", "form"), FORMS)
def test_opcheck_and_compile(backend: str, form: str) -> None:
    values = pair(5, 11, 4, 0.1)
    options = torch.tensor(0.5), None, form, backend
    torch.library.opcheck(_retention_mse, (*values, *options, True, True, True, False))
    torch.library.opcheck(_retention_mse, (*(v.detach() for v in values), *options, False, False, False, False))

    def step(*v: Tensor) -> Tensor:
        return ops.retention_mse(*v, *values[3:], form=form, backend=backend) * 2

    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*values[:3]), values[:3])
    for g, e in zip(got, torch.autograd.grad(step(*values[:3]), values[:3]), strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@COMPILED
def test_every_instruction_set_that_this_machine_has(isa: str) -> None:
    """The whole of this file again, in a process that is told which kernels to use."""
    passes_under(isa, __file__, "not instruction_set and not gradcheck and not opcheck and not torch")


def test_inputs_that_do_not_fit_are_refused() -> None:
    hs, ws, bs, ht, wt, bt = (v.detach() for v in pair(2, 11, 4, 0.1))
    with pytest.raises(ShapeError, match=r"past task 0: got student rows .*\[2, 4\] and teacher rows .*\[1, 4\]"):
        ops.retention_mse(hs, ws, bs, ht[:1], wt, bt)
    with pytest.raises(ShapeError, match="past task 1: .*at least one row"):
        ops.retention_mse([hs, hs[:0]], [ws, ws], [bs, bs], [ht, ht[:0]], [wt, wt], [bt, bt])
    with pytest.raises(ShapeError, match=r"\[1, 1, 1, 1, 1, 1, 2\] past tasks"):
        ops.retention_mse(hs, ws, bs, ht, wt, bt, [0.5, 0.5])
    with pytest.raises(ShapeError, match="past tasks"):
        ops.retention_mse([], [], [], [], [], [], [])
    with pytest.raises(ShapeError, match=r"the teacher's weight is \[10, 4\].*expected as the student's, \[11, 4\]"):
        ops.retention_mse(hs, ws, bs, ht, wt[1:], bt[1:])
    with pytest.raises(ShapeError, match="teacher: weight is torch.float64"):
        ops.retention_mse(hs, ws, bs, ht, wt.double(), bt)
    with pytest.raises(ShapeError, match="equal dtypes"):
        ops.retention_mse(hs, ws, bs, ht.double(), wt, bt)
    with pytest.raises(ShapeError, match="form is 'fast'"):
        ops.retention_mse(hs, ws, bs, ht, wt, bt, form="fast")
    with pytest.raises(BackendError, match="backend 'torch' has no form 'gram'"):
        ops.retention_mse(hs, ws, bs, ht, wt, bt, form="gram", backend="torch")
    with pytest.raises(BackendError, match="'nonsense' cannot run retention_mse"):
        ops.retention_mse(hs, ws, bs, ht, wt, bt, backend="nonsense")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_handed_on_once_and_not_copied(backend: str) -> None:
    values = pair(5, 300, 6, 0.1)
    loss = ops.retention_mse(*values, backend=backend)
    loss.backward(retain_graph=True)
    assert values[1].grad is not None
    first = values[1].grad.clone()
    loss.backward()
    torch.testing.assert_close(values[1].grad, 2 * first)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()
    handed_on: list[int] = []
    values[1].grad = None
    values[1].register_hook(lambda grad: handed_on.append(grad.data_ptr()))
    ops.retention_mse(*values, backend=backend).backward()
    assert values[1].grad is not None and handed_on == [values[1].grad.data_ptr()]
