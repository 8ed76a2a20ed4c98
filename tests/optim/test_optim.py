"""Our Adam on sparse gradients beside PyTorch's Adam on the same gradients, dense."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from adam_checks import COMPILED, MOMENTS, assert_same, assert_same_state, by_rows, random_gradients, small_model
from instruction_sets import INSTRUCTION_SETS, passes_under
from steps import t1_step
from torch import nn

from teracon_fast.errors import ConfigError
from teracon_fast.ops import native
from teracon_fast.optim.adam import Adam
from teracon_fast.train.loop import make_optimizer

Make = Callable[..., Adam]
V = 150  # more than two blocks of rows of the kernel


@pytest.fixture(params=[pytest.param(kind, marks=COMPILED) for kind in ("compiled", "compiled lazy")] + ["torch"])
def adam(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes our Adam: with the compiled kernels, all rows in each step or rows left behind, and without them."""
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
    return partial(Adam, lazy=request.param != "compiled")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(V, 256), (V, 7), (V,), (20, 3, 5), (3, 8)])
def test_many_steps_are_those_of_torch(adam: Make, shape: tuple[int, ...], dtype: torch.dtype, fused: bool) -> None:
    start = torch.randn(shape, dtype=dtype)
    start[::3] = 0  # where the parameter is the sum of its updates alone
    mine, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours, theirs = adam([mine], lr=1e-2, fused=fused), torch.optim.Adam([other], lr=1e-2, fused=fused)
    for step, (gradient, present) in enumerate(random_gradients(shape, 40, dtype)):
        mine.grad, other.grad = by_rows(gradient, present), gradient
        if step == 20:
            ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 3e-4
        ours.step()
        theirs.step()
        if step in (7, 8, 25):
            ours.flush()
            assert_same(mine, other)
    assert_same_state(ours, theirs)
    assert_same(mine, other)
    unseen = shape[0] // 5
    assert torch.equal(mine[:unseen], start[:unseen])


def test_one_step_has_torchs_roundings(adam: Make) -> None:
    """From parameters of zero, so that no rounding of the parameter hides one of the update."""
    mine, other = nn.Parameter(torch.zeros(V, 64)), nn.Parameter(torch.zeros(V, 64))
    options = {"betas": (0.8, 0.99), "eps": 1e-4, "fused": True}
    ours, theirs = adam([mine], **options), torch.optim.Adam([other], **options)
    [(gradient, present)] = random_gradients((V, 64), 1, torch.float32)
    mine.grad, other.grad = by_rows(gradient, present), gradient
    ours.step()
    theirs.step()
    assert_same(mine, other)


def test_repeated_and_unordered_rows_are_added_up(adam: Make) -> None:
    mine, other = nn.Parameter(torch.randn(V, 8)), nn.Parameter(torch.zeros(V, 8))
    other.data.copy_(mine.data)
    ours, theirs = adam([mine], fused=True), torch.optim.Adam([other], fused=True)
    for _ in range(3):
        rows, values = torch.randint(0, 20, (60,)), torch.randn(60, 8)
        mine.grad = torch.sparse_coo_tensor(rows[None], values, (V, 8), check_invariants=True)
        other.grad = torch.zeros(V, 8).index_add(0, rows, values)
        ours.step()
        theirs.step()
    assert_same_state(ours, theirs)
    assert_same(mine, other)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "transposed parameter"])
def test_gradients_and_parameters_of_any_layout(adam: Make, layout: str) -> None:
    start = torch.randn(6, V).t() if layout == "transposed parameter" else torch.randn(V, 6)
    mine, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours, theirs = adam([mine], fused=True), torch.optim.Adam([other], fused=True)
    rows = torch.arange(0, V, 4)
    values = torch.randn(6, len(rows)).t() if layout == "transposed" else torch.tensor(0.7).expand(len(rows), 6)
    for _ in range(3):
        mine.grad = torch.sparse_coo_tensor(rows[None], values, (V, 6), check_invariants=True)
        other.grad = torch.zeros(V, 6).index_copy(0, rows, values)
        ours.step()
        theirs.step()
    assert_same_state(ours, theirs)
    assert_same(mine, other)


@pytest.mark.parametrize("fused", [False, True])
def test_groups_dense_gradients_and_none(adam: Make, fused: bool) -> None:
    shapes = [(V, 8), (5, 8), (V, 3), (4,)]
    start = [torch.randn(shape) for shape in shapes]
    sides = []
    for kind in (adam, torch.optim.Adam):
        values = [nn.Parameter(w.clone()) for w in start]
        groups = [{"params": values[:2]}, {"params": values[2:], "lr": 0.1, "betas": (0.5, 0.9)}]
        sides.append((values, kind(groups, lr=1e-2, fused=fused)))
    (mine, ours), (other, theirs) = sides
    streams = [random_gradients(shape, 12, torch.float32) for shape in shapes]
    for step in range(12):
        for i, stream in enumerate(streams):
            gradient, present = next(stream)
            mine[i].grad, other[i].grad = by_rows(gradient, present) if i in (0, 2) else gradient, gradient
            if i == 2 and step > 8:
                mine[i].grad = gradient  # dense from now on
            if (i == 0 and step < 3) or (i in (1, 2) and step == 5):
                mine[i].grad = other[i].grad = None
        before = [w.detach().clone() for w in mine]
        ours.step()
        theirs.step()
        assert all(torch.equal(w, old) for w, old in zip(mine, before, strict=True) if w.grad is None)
    assert_same_state(ours, theirs)
    for a, b in zip(mine, other, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("fused", [False, True])
def test_either_optimizer_goes_on_from_the_others_state(adam: Make, fused: bool) -> None:
    """The state changes hands at every step."""
    start = torch.randn(V, 16)
    mine, other, alone = (nn.Parameter(start.clone()) for _ in range(3))
    ours, theirs = adam([mine], lr=1e-2, fused=fused), torch.optim.Adam([other], lr=1e-2, fused=fused)
    reference = torch.optim.Adam([alone], lr=1e-2, fused=fused)
    for step, (gradient, present) in enumerate(random_gradients((V, 16), 10, torch.float32)):
        mine.grad, other.grad, alone.grad = by_rows(gradient, present), gradient, gradient
        turn, rest = ((mine, ours), (other, theirs)) if step % 2 else ((other, theirs), (mine, ours))
        turn[1].step()
        reference.step()
        rest[1].load_state_dict(pickle.loads(pickle.dumps(turn[1].state_dict())))
        rest[0].data.copy_(turn[0].data)
    assert_same_state(ours, reference)
    assert_same(mine, alone)


def test_closures_hooks_and_schedulers_run_once(adam: Make) -> None:
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # PyTorch wraps the step of each class at its first optimizer
    weight = nn.Parameter(torch.ones(4, 2))
    optimizer = adam([weight], lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> float:
        seen.append("closure")
        weight.grad = by_rows(torch.ones(4, 2), torch.tensor([True, False, True, False]))
        return 3.0

    assert optimizer.step(closure) == 3.0
    scheduler.step()
    assert seen == ["before", "closure", "after"] and optimizer.param_groups[0]["lr"] == 0.25
    torch.testing.assert_close(weight.detach()[:, 0], torch.tensor([0.5, 1.0, 0.5, 1.0]))


def test_a_row_not_seen_for_long_ends_like_torchs(adam: Make) -> None:
    """Its first moment decays below the smallest normal number, where the compiled kernel takes it for zero."""
    mine, other = nn.Parameter(torch.ones(3, 20)), nn.Parameter(torch.ones(3, 20))
    ours, theirs = adam([mine], fused=True), torch.optim.Adam([other], fused=True)
    for step in range(1100):
        present = torch.tensor([step == 0, True, False])
        gradient = 1e-3 * torch.randn(3, 20) * present[:, None]
        mine.grad, other.grad = by_rows(gradient, present), gradient
        ours.step()
        theirs.step()
    ours.flush()
    state, expected = ours.state[mine], theirs.state[other]
    # Where products are rounded before they are added, a tenth of a moment is zero before the moment is.
    tiny = 10 * torch.finfo(torch.float32).tiny
    assert float(expected["exp_avg"][0].abs().amax()) < tiny and float(state["exp_avg"][0].abs().amax()) < tiny
    assert_same(mine, other)
    for name in MOMENTS:
        normal = expected[name].abs() >= tiny
        assert_same(state[name][normal], expected[name][normal])
        assert float(state[name][~normal].abs().amax()) <= tiny
    assert float(torch.tensor(1e-39) * 1) != 0, "the kernel must leave the processor's mode as it was"


@pytest.mark.parametrize("eps", [0.0, 1e-12])
def test_tiny_eps(adam: Make, eps: float) -> None:
    """Nothing counts as zero, and with eps = 0 a row without moments is 0 / 0."""
    mine, other = nn.Parameter(torch.ones(4, 20)), nn.Parameter(torch.ones(4, 20))
    ours, theirs = adam([mine], eps=eps, fused=True), torch.optim.Adam([other], eps=eps, fused=True)
    gradient = torch.zeros(4, 20)
    gradient[1:] = torch.tensor([1e-3, 1e-18, 1e-19])[:, None]
    for _ in range(3):
        mine.grad, other.grad = by_rows(gradient, torch.arange(4) > 0), gradient
        ours.step()
        theirs.step()
    ours.flush()
    torch.testing.assert_close(mine, other, equal_nan=True, rtol=0, atol=0)
    assert bool(mine[0].isnan().all()) == (eps == 0)


def test_a_gradient_that_is_no_number_shows(adam: Make) -> None:
    weight = nn.Parameter(torch.ones(5, 20))
    optimizer = adam([weight])
    gradient = torch.ones(5, 20)
    gradient[1, 3], gradient[2, 19] = float("nan"), float("inf")
    for _ in range(2):
        weight.grad = by_rows(gradient, torch.tensor([True, True, True, False, False]))
        optimizer.step()
    assert weight.isnan().nonzero().tolist() == [[1, 3], [2, 19]]


def test_every_run_and_number_of_threads_gives_the_same_bits(adam: Make) -> None:
    start = torch.randn(1000, 33)
    gradients = list(random_gradients((1000, 33), 6, torch.float32))
    ends, threads = [], torch.get_num_threads()
    try:
        for number in (1, 1, 3):
            torch.set_num_threads(number)
            weight = nn.Parameter(start.clone())
            optimizer = adam([weight])
            for gradient, present in gradients:
                weight.grad = by_rows(gradient, present)
                optimizer.step()
            optimizer.flush()
            ends.append(torch.cat([weight.detach(), *(optimizer.state[weight][name] for name in MOMENTS)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_a_step_is_a_change_that_autograd_sees(adam: Make) -> None:
    weight = nn.Parameter(torch.ones(4, 2))
    loss = weight.square().sum()
    weight.grad = by_rows(torch.ones(4, 2), torch.arange(4) > 1)
    adam([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("option", ["weight_decay", "amsgrad", "maximize", "capturable", "differentiable"])
def test_options_that_sparse_gradients_lack_are_refused(option: str) -> None:
    weight = nn.Parameter(torch.ones(4, 2))
    optimizer = Adam([weight], **{option: 0.1 if option == "weight_decay" else True})  # type: ignore[arg-type]
    weight.grad = by_rows(torch.ones(4, 2), torch.arange(4) > 1)
    with pytest.raises(ConfigError, match=rf"got a sparse gradient and \{{'{option}': .*expected none of these"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(4, 2)) and not optimizer.state[weight]


def test_other_gradients_that_do_not_fit_are_refused() -> None:
    weight = nn.Parameter(torch.ones(4, 2))
    optimizer = Adam([weight], fused=True)
    weight.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(ConfigError, match="got a gradient with 2 sparse dimensions, expected 1"):
        optimizer.step()
    weight.grad = by_rows(torch.ones(4, 2), torch.arange(4) > 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    with pytest.raises(ConfigError, match="from a GradScaler, expected fused=False"):
        scaler.step(optimizer)


@COMPILED
@pytest.mark.parametrize("rows", [[1, 1], [2, 1], [-1, 2], [0, 4], [2**40, 2**41], [-(2**62), 1]])
def test_the_kernel_reads_no_rows_out_of_range(rows: list[int]) -> None:
    tensors = [torch.ones(4, 2) for _ in range(3)]
    with pytest.raises(RuntimeError, match="out of range or of order: expected 0 to 3, ascending"):
        torch.ops.teracon_fast.adam_rows(*tensors, torch.tensor(rows), torch.ones(2, 2), 0.9, 0.99, 1e-8, 1.0, 1.0, 0, 1)


@COMPILED
def test_the_kernel_refuses_tensors_that_do_not_fit() -> None:
    def call(**changes: object) -> None:
        names = ("parameter", "exp_avg", "exp_avg_sq")
        given = {name: torch.ones(4, 2) for name in names} | {"rows": torch.tensor([0, 3]), "gradient": torch.ones(2, 2)}
        numbers = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step_size": 1.0, "root": 1.0, "tail": 0, "threads": 1}
        torch.ops.teracon_fast.adam_rows(**given | numbers | changes)

    call()
    for name in ("parameter", "exp_avg", "exp_avg_sq", "gradient"):
        for wrong in (torch.ones(3, 3), torch.ones(4, 2).double(), torch.ones(2, 4).t()):
            with pytest.raises(RuntimeError, match="adam_rows: "):
                call(**{name: wrong})
    for wrong_call in ({"rows": torch.tensor([0, 3]).int()}, {"threads": 0}, {"parameter": torch.ones(())}):
        with pytest.raises(RuntimeError, match="adam_rows: "):
            call(**wrong_call)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@COMPILED
def test_every_instruction_set_that_this_machine_has(isa: str) -> None:
    """The compiled kernel's tests again, in a process that is told which instructions to use."""
    passes_under(isa, __file__, "compiled or kernel")


@COMPILED
def test_training_with_sparse_gradients_is_training_with_dense_ones() -> None:
    model = small_model()
    dense = copy.deepcopy(model)
    optimizer, plain = make_optimizer(model, 1e-2), torch.optim.Adam(dense.parameters(), lr=1e-2)
    assert isinstance(optimizer, Adam) and model.sparse_embedding_grad and not dense.sparse_embedding_grad
    for _ in range(5):
        x = torch.randint(0, 20, (4, 9))
        t1_step(model, optimizer, x, 3.0)
        t1_step(dense, plain, x, 3.0)
    assert model.embeding.weight.grad is not None and model.embeding.weight.grad.is_sparse
    for mine, other in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@COMPILED
def test_only_the_model_of_the_optimizer_gets_sparse_gradients() -> None:
    model = small_model()
    assert not model.sparse_embedding_grad
    make_optimizer(model, 1e-2)
    assert model.sparse_embedding_grad
    for copied in (copy.deepcopy(model), model.frozen(), model.extended(3), pickle.loads(pickle.dumps(model))):
        assert not copied.sparse_embedding_grad
    assert model.sparse_embedding_grad
    model.double()
    make_optimizer(model, 1e-2)
    assert not model.sparse_embedding_grad


def test_without_the_extension_gradients_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    model = small_model()
    make_optimizer(model, 1e-2)
    assert not model.sparse_embedding_grad


@COMPILED
def test_the_compiled_kernel_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object) -> None:
        raise AssertionError("the operations of torch ran")

    monkeypatch.setattr(torch.Tensor, "to_dense", unexpected)
    model = small_model()
    t1_step(model, make_optimizer(model, 1e-2), torch.randint(0, 20, (4, 9)), 3.0)
