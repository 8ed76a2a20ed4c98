"""The operation on task masks: backends agree, gradients, compilation, refusals. Equality with the equations is in
tests/test_masks.py and tests/kernels/test_triton_masks.py."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from teracon_fast import FastTCN, env_report, ops
from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.ops import MaskParameters
from teracon_fast.ops.backends import BackendError, of_model
from teracon_fast.ops.task_masks import MaskVariant, relation_width
from teracon_fast.ops.task_masks import torch as masks

# On a GPU the kernels are tested in tests/kernels: these tests are of the CPU.
BACKENDS = [name for name in env_report()["backends"]["task_masks"] if name != "triton" or not torch.cuda.is_available()]
TRITON = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton neither runs nor is interpreted on the CPU here")


def parameters(
    tasks: int, variant: MaskVariant | None = "relation", dtype: torch.dtype = torch.float32, chosen: int | None = None
) -> MaskParameters:
    """Leaves; variant None: plain masks."""
    embeddings = torch.randn(4, tasks, 7, dtype=dtype).requires_grad_()
    if variant is None:
        return MaskParameters(embeddings)
    shape = 4, tasks if chosen is None else chosen
    weights = torch.randn(*shape, relation_width(tasks, variant), dtype=dtype).requires_grad_()
    return MaskParameters(embeddings, weights, torch.randn(shape, dtype=dtype).requires_grad_(), variant)


def leaves(values: MaskParameters) -> list[Tensor]:
    return [part for part in values[:3] if isinstance(part, Tensor)]


@TRITON
@pytest.mark.parametrize("variant", ["relation", "positive_only", None])
@pytest.mark.parametrize("tasks", [None, (1,), (2, 0), (1, 1, 0)])
def test_backends_agree(variant: MaskVariant | None, tasks: tuple[int, ...] | None) -> None:
    values = parameters(3, variant, chosen=3 if tasks is None else len(tasks))
    found = [
        ops.task_masks(*values[:3], 2.0, variant=values.variant, tasks=tasks, backend=backend) for backend in ("torch", "triton")
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(found[0])
    gradients = [torch.autograd.grad((one * weight).sum(), leaves(values)) for one in found]
    for got, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teachers", ["relation", "positive_only", None])
def test_a_step_has_the_masks_of_both_and_the_rates_between_them(backend: str, teachers: MaskVariant | None) -> None:
    student, teacher = parameters(3), parameters(2, teachers)
    for current in (2, 0):
        found = ops.step_masks(student, teacher, 3.0, 5.0, current=current, backend=backend)
        expected = masks.relation_masks(*leaves(student), 3.0)
        its = ops.task_masks(*teacher[:3], 3.0, variant=teacher.variant)
        torch.testing.assert_close(found.masks, expected)
        torch.testing.assert_close(found.teacher, its)
        torch.testing.assert_close(found.rho, masks.rho(its, expected[:, current], 5.0), rtol=0, atol=1e-6)
    assert torch.equal(ops.step_masks(student, teacher, 3.0, 5.0, backend=backend).rho, ops.step_masks(
        student, teacher, 3.0, 5.0, current=2, backend=backend).rho)  # fmt: skip
    assert found.masks.requires_grad and not found.teacher.requires_grad and not found.rho.requires_grad
    found.masks.sum().backward()
    assert all(part.grad is not None for part in leaves(student)) and all(part.grad is None for part in leaves(teacher))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_asked_for(backend: str) -> None:
    values = parameters(3)
    full = torch.autograd.grad(ops.task_masks(*values[:3], 1.0, backend=backend).sum(), leaves(values))
    for number, expected in enumerate(full):
        some = [part.detach().requires_grad_(i == number) for i, part in enumerate(leaves(values))]
        ops.task_masks(*some, 1.0, backend=backend).sum().backward()
        assert [part.grad is not None for part in some] == [i == number for i in range(3)]
        torch.testing.assert_close(some[number].grad, expected)


@pytest.mark.parametrize("variant", ["relation", "positive_only", None])
def test_gradcheck(variant: MaskVariant | None) -> None:
    values = parameters(3, variant, torch.float64, 2)
    torch.autograd.gradcheck(
        lambda *v: ops.task_masks(*[*v, None, None][:3], 1.3, variant=values.variant, tasks=(2, 0)), leaves(values)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_may_be_a_tensor(backend: str) -> None:
    values, teacher = parameters(3), parameters(2)
    for s in (torch.tensor(2.5), torch.tensor([2.5]), torch.tensor(2.5, dtype=torch.float64)):
        found = ops.step_masks(values, teacher, s, backend=backend)
        for got, expected in zip(found, ops.step_masks(values, teacher, 2.5, backend=backend), strict=True):
            assert torch.equal(got, expected)
        got = torch.autograd.grad(found.masks.sum(), leaves(values))
        again = torch.autograd.grad(ops.task_masks(*values[:3], 2.5, backend=backend).sum(), leaves(values))
        assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))


@TRITON
def test_a_gradient_of_the_scale_is_formed_or_refused() -> None:
    values, s = parameters(2), torch.tensor(1.5, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.task_masks(*values[:3], s, backend="torch").sum(), s)
    assert grad.isfinite()
    with pytest.raises(BackendError, match="s requires a gradient"):
        ops.task_masks(*values[:3], s, backend="triton")
    with torch.no_grad():
        ops.task_masks(*values[:3], s, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    values, teacher = parameters(3), parameters(2)
    expected = ops.step_masks(values, teacher, 2.0, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.step_masks(values, teacher, 2.0, backend=backend)
    assert all(torch.equal(got, e) for got, e in zip(found, expected, strict=True))


@TRITON
def test_opcheck() -> None:
    triton = importlib.import_module("teracon_fast.ops.task_masks.triton")
    values, teacher, plain = parameters(3), [part.detach() for part in leaves(parameters(2))], parameters(2, None)
    for own, scale, tasks, past in (
        (values, (2.0, None), [0, 1, 2], (*teacher, True, 6.0, 2)),
        (parameters(3, chosen=2), (0.0, torch.tensor(2.0)), [2, 0], (None, None, None, False, 0.0, 0)),
        (plain, (2.0, None), [0, 1], (plain.embeddings.detach(), None, None, True, 6.0, 1)),
    ):
        torch.library.opcheck(triton._task_masks, (*own[:3], True, *scale, tasks, *past))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph_that_other_scales_use_again(backend: str) -> None:
    torch.compiler.reset()
    values, teacher = parameters(3), parameters(2)
    graphs = 0

    def counted(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def step(s: Tensor, *student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.step_masks(MaskParameters(*student), teacher, s, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend=counted)
    for s in (1.0, 4.0, 9.0):
        for got, expected in zip(compiled(torch.tensor(s), *leaves(values)), step(torch.tensor(s), *leaves(values)), strict=True):
            torch.testing.assert_close(got, expected)
    assert graphs == 1
    traced = torch.compile(lambda *v: step(torch.tensor(4.0), *v)[0], fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(traced(*leaves(values)).sum(), leaves(values))
    for g, e in zip(got, torch.autograd.grad(step(torch.tensor(4.0), *leaves(values))[0].sum(), leaves(values)), strict=True):
        torch.testing.assert_close(g, e)


def test_columns_that_inference_was_first_to_ask_for_serve_training() -> None:
    masks._kept_columns.cache_clear()
    values = parameters(3)
    with torch.inference_mode():
        ops.task_masks(*(part.detach() for part in leaves(values)), 1.0, backend="torch")
    ops.task_masks(*values[:3], 1.0, backend="torch").sum().backward()
    assert values.embeddings.grad is not None


def test_inputs_that_do_not_fit_are_refused() -> None:
    e, w, b, _ = parameters(3)
    assert w is not None and b is not None
    for call, message in (
        (lambda: ops.task_masks(e[0], w, b, 1.0), r"embeddings are torch.float32 \[3, 7\], expected floating \[S, T, f\]"),
        (lambda: ops.task_masks(e, w, b, 1.0, variant="positive_only"), r"weights are .*\[4, 3, 5\].*expected .*\[4, 3, 3\]"),
        (lambda: ops.task_masks(e, w, b, 1.0, tasks=(0, 1)), r"expected torch.float32 \[4, 2, 5\]"),
        (lambda: ops.task_masks(e, w, b.double(), 1.0), "biases are torch.float64"),
        (lambda: ops.task_masks(e, w, None, 1.0), "weights and biases go together"),
        (lambda: ops.task_masks(e, w, b, 1.0, tasks=(0, 1, 3)), r"tasks are \[0, 1, 3\], expected numbers in 0..2"),
        (lambda: ops.task_masks(e, w, b, torch.ones(2)), r"s is \[2\], expected one number"),
        (lambda: ops.step_masks(MaskParameters(e, w, b), MaskParameters(e[..., :5]), 1.0), r"teacher's embeddings .*\[4, J, 7\]"),
        (lambda: ops.step_masks(MaskParameters(e, w, b), MaskParameters(e), 1.0, current=3), "current is 3, expected 0..2"),
        (lambda: ops.step_masks(MaskParameters(e, w[:, :1], b), MaskParameters(e), 1.0), "student: weights are"),
    ):
        with pytest.raises(ShapeError, match=message):
            call()
    with pytest.raises(ConfigError, match="mask variant is 'both'"):
        ops.task_masks(e, w, b, 1.0, variant="both")


def test_the_operation_refuses_what_it_has_not_and_a_model_takes_the_formulas_instead() -> None:
    values = parameters(2)
    with pytest.raises(BackendError, match="backend 'cpu' cannot run task_masks, expected 'auto' or one of"):
        ops.task_masks(*values[:3], 1.0, backend="cpu")
    assert of_model("cpu", "task_masks") == "torch"
    assert [of_model(name, "linear_rank") for name in ("auto", "cpu", "torch", "triton")] == ["auto", "cpu", "torch", "triton"]
    assert of_model("triton", "task_masks") == "triton" and of_model("auto", "task_masks") == "auto"
    with pytest.raises(BackendError, match="'nonsense' cannot run task_masks"):
        ops.task_masks(*values[:3], 1.0, backend=of_model("nonsense", "task_masks"))
    assert env_report()["auto"]["task_masks"] == "torch", "the kernels run on request only until they are measured on a GPU"


@pytest.mark.parametrize("mask", ["relation", "positive_only", "none"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_model_has_the_same_masks_on_every_backend(mask: str, tasks: int) -> None:
    model = FastTCN(num_items=9, channels=7, labels=[9, 4, 3][:tasks], dilations=(1, 2), mask=mask)
    teacher = FastTCN(num_items=9, channels=7, labels=[9, 4][: max(1, tasks - 1)], dilations=(1, 2), mask=mask).frozen()
    chosen: list[tuple[Any, bool]] = [(None, False), ([0], False), ([0], True), ([tasks - 1, 0], False)]
    expected = [model.masks(2.0, *choice) for choice in chosen]
    for backend in ("cpu", *BACKENDS):
        model.backend = teacher.backend = backend
        for found, (which, plain) in zip(expected, chosen, strict=True):
            torch.testing.assert_close(model.masks(2.0, which, plain), found)
        step = model.step_masks(teacher, 2.0, 5.0)
        torch.testing.assert_close(step.masks, expected[0])
        torch.testing.assert_close(step.teacher, teacher.masks(2.0))
        rho = masks.rho(step.teacher, step.masks[:, -1], 5.0)
        torch.testing.assert_close(step.rho, rho, rtol=0, atol=1e-6)
        assert step.masks.requires_grad and not step.teacher.requires_grad
        model.zero_grad()
        model.masks(2.0, [tasks - 1]).sum().backward()
        used = [[part.grad is not None for part in block.task_embeddings] for block in model.blocks]
        assert used == 2 * [[model.has_relation or task == tasks - 1 for task in range(tasks)]]
