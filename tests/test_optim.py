"""Our Adam on sparse gradients beside PyTorch's Adam on the same gradients, dense."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, passes_under
from torch import Tensor, nn

from teracon_fast import FastTCN, Request, _native, deferred, ops, trainer
from teracon_fast.deferred import Deferred
from teracon_fast.errors import ConfigError
from teracon_fast.optim import Adam
from teracon_fast.trainer import make_optimizer, t1_step

COMPILED = pytest.mark.skipif(not _native.available(), reason="this installation has no compiled extension")
Make = Callable[..., Adam]
V = 150  # more than two blocks of rows of the kernel
MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture(params=[pytest.param(kind, marks=COMPILED) for kind in ("compiled", "compiled deferred")] + ["torch"])
def adam(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes our Adam: with the compiled kernels, all rows in each step or rows left behind, and without them."""
    if request.param == "torch":
        monkeypatch.setattr(_native, "available", lambda: False)
    return partial(Adam, deferred=request.param != "compiled")


def by_rows(gradient: Tensor, present: Tensor) -> Tensor:
    """A gradient as `.grad` holds it: rows ascending, without the mark that they are."""
    rows = present.nonzero().T
    return torch.sparse_coo_tensor(rows, gradient[present], gradient.shape, check_invariants=True)


def random_gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of very different sizes and the rows that have one; the first fifth of the rows never does."""
    for step in range(steps):
        present = torch.rand(shape[0]) < (0.0 if step == 3 else 0.4)
        present[: shape[0] // 5] = False
        scale = 10.0 ** torch.randint(-6, 3, (shape[0], *[1] * (len(shape) - 1)))
        gradient = torch.randn(shape, dtype=dtype) * scale.to(dtype)
        gradient[~present] = 0
        yield gradient, present


def assert_same(got: Tensor, expected: Tensor) -> None:
    """The same bits."""
    assert got.dtype == expected.dtype and torch.equal(got.detach(), expected.detach())


def assert_same_state(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == other["param_groups"] and mine["state"].keys() == other["state"].keys()
    for index, state in other["state"].items():
        assert list(mine["state"][index]) == list(state)
        step = mine["state"][index]["step"]
        assert step.dtype == state["step"].dtype and torch.equal(step, state["step"])
        for name in MOMENTS:
            assert mine["state"][index][name].stride() == state[name].stride()
            assert_same(mine["state"][index][name], state[name])


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
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # PyTorch wraps the step of each class at its first optimiser
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


def small_model() -> FastTCN:
    return FastTCN(num_items=30, channels=8, dilations=[1, 2])


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
    monkeypatch.setattr(_native, "available", lambda: False)
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


def deferring(model: FastTCN, monkeypatch: pytest.MonkeyPatch) -> Adam:
    """The optimiser of a model whose embedding counts as large."""
    monkeypatch.setattr(trainer, "DEFERRED_FROM", 1)
    optimizer = make_optimizer(model, 1e-2)
    assert optimizer.deferred
    return optimizer


def batches(steps: int) -> list[Tensor]:
    """Few of the 30 items in each, so that rows are left behind."""
    return [torch.randint(1, 30, (2, 5)) for _ in range(steps)]


def trained(monkeypatch: pytest.MonkeyPatch) -> tuple[FastTCN, Adam, FastTCN]:
    """A model with rows that are behind, its optimiser, and the model that it must be."""
    model, data = small_model(), batches(12)
    plain = copy.deepcopy(model)
    optimizer, dense = deferring(model, monkeypatch), make_optimizer(plain, 1e-2)
    dense.deferred = False
    for x in data:
        t1_step(model, optimizer, x, 3.0)
        t1_step(plain, dense, x, 3.0)
    assert not torch.equal(model.embeding.stored, plain.embeding.weight), "no row is behind, so nothing is tested"
    return model, optimizer, plain


READERS: dict[str, Callable[[FastTCN], Tensor]] = {
    "weight": lambda model: model.embeding.weight,
    "module": lambda model: model.embeding(torch.arange(30)),
    "rows": lambda model: model.embeding.rows(torch.arange(30)),
    "parameters": lambda model: next(p for p in model.parameters() if p.shape == (30, 8) and p is model.embeding.stored),
    "named_parameters of what holds it": lambda model: dict(nn.ModuleList([model]).named_parameters())["0.embeding.weight"],
    "state_dict": lambda model: model.state_dict()["embeding.weight"],
    "state_dict of what holds it": lambda model: nn.ModuleList([model]).state_dict()["0.embeding.weight"],
    "deepcopy": lambda model: copy.deepcopy(model).embeding.stored,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)).embeding.stored,
    "frozen": lambda model: model.frozen().embeding.stored,
    "extended": lambda model: model.extended(4).embeding.stored,
    "double": lambda model: model.double().embeding.stored.float(),
    "gradients turned dense": lambda model: setattr(model, "sparse_embedding_grad", False) or model.embeding.stored,
}


@COMPILED
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_of_a_model_sees_a_row_that_is_behind(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, expected = trained(monkeypatch)
    assert torch.equal(READERS[reader](model), expected.embeding.weight)


@COMPILED
@pytest.mark.parametrize("users", [3, 80])
def test_encoding_brings_up_to_date_what_it_reads(users: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, expected = trained(monkeypatch)
    x = torch.randint(0, 9, (users, 7))
    with torch.no_grad():
        assert torch.equal(model.encode(x, [Request(0)])[0], expected.encode(x, [Request(0)])[0])
    assert torch.equal(model.encoder()(x + 3, 0), expected.encoder()(x + 3, 0))
    assert not torch.equal(model.embeding.stored, expected.embeding.weight), "only the rows that are read"


@COMPILED
def test_a_training_step_takes_no_row_that_it_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, expected = trained(monkeypatch)
    took = []
    monkeypatch.setattr(Deferred, "catch_up", lambda self, parameter, items=None: took.append(items))
    t1_step(model, optimizer, torch.full((2, 5), 3), 3.0)
    assert took and all(items is not None and bool((items == 3).all()) for items in took)


@COMPILED
def test_training_that_was_interrupted_goes_on_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _ = trained(monkeypatch)
    saved = pickle.dumps((model.state_dict(), optimizer.state_dict()))
    again, rest = small_model(), batches(6)
    other = deferring(again, monkeypatch)
    state, moments = pickle.loads(saved)
    again.load_state_dict(state)
    other.load_state_dict(moments)
    for x in rest:
        t1_step(model, optimizer, x, 3.0)
        t1_step(again, other, x, 3.0)
    assert_same_state(optimizer, other)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert_same(mine, theirs)


@COMPILED
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.9), (0.9, 0.0), (0.99, 0.5)])
def test_updates_that_come_back_to_life(betas: tuple[float, float]) -> None:
    """A learning rate too small to change anything, then a large one, then none, and constants that change."""
    mine, other = nn.Parameter(torch.randn(20, 40)), nn.Parameter(torch.zeros(20, 40))
    other.data.copy_(mine.data)
    ours = Adam([mine], betas=betas, fused=True, deferred=True)
    theirs = torch.optim.Adam([other], betas=betas, fused=True)
    for step in range(60):
        for group in (ours.param_groups[0], theirs.param_groups[0]):
            group["lr"] = 1e-9 if step < 20 else 1.0 if step % 20 == 5 else 0.0 if step < 30 else 1e-3
            if step == 45:
                group["betas"], group["eps"] = (0.8, 0.95), 1e-6
        present = torch.rand(20) < 0.05
        gradient = torch.randn(20, 40) * present[:, None]
        mine.grad, other.grad = by_rows(gradient, present), gradient
        ours.step()
        theirs.step()
    assert_same_state(ours, theirs)
    assert_same(mine, other)


@COMPILED
def test_more_steps_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "_MOST_STEPS", 7)
    mine, other = nn.Parameter(torch.randn(20, 40)), nn.Parameter(torch.zeros(20, 40))
    other.data.copy_(mine.data)
    ours, theirs = Adam([mine], fused=True, deferred=True), torch.optim.Adam([other], fused=True)
    for _ in range(40):
        present = torch.rand(20) < 0.1
        gradient = torch.randn(20, 40) * present[:, None]
        mine.grad, other.grad = by_rows(gradient, present), gradient
        ours.step()
        theirs.step()
    assert_same_state(ours, theirs)
    assert_same(mine, other)


@COMPILED
def test_a_copied_optimizer_and_a_lost_one() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = Adam([weight], lr=0.1, deferred=True)
    for row in (0, 1, 2):
        weight.grad = by_rows(torch.ones(4, 3), torch.arange(4) == row)
        optimizer.step()
    copied = pickle.loads(pickle.dumps(optimizer))
    assert copied.deferred and torch.equal(copied.param_groups[0]["params"][0], weight)
    weight.grad = by_rows(torch.ones(4, 3), torch.arange(4) == 3)
    optimizer.step()
    before = weight.detach().clone()
    del optimizer
    ops.embedding_rows(weight, torch.tensor([0, 0, 3]))
    assert not torch.equal(weight[0], before[0]) and torch.equal(weight[1:], before[1:])
    ops.embedding_rows(weight, torch.arange(4))
    assert not torch.equal(weight[1], before[1]) and not torch.equal(weight[2], before[2])


@COMPILED
@pytest.mark.parametrize("last", [[-2, 0], [2, 0], [0, 2**31 - 1]])
def test_the_kernels_refuse_rows_that_have_taken_steps_that_are_none(last: list[int]) -> None:
    tensors = [torch.ones(2, 4) for _ in range(3)]
    steps, growing = torch.ones(1, 4), torch.zeros(0, dtype=torch.int64)
    counts = torch.tensor(last, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="adam_catch_up: last has a row"):
        torch.ops.teracon_fast.adam_catch_up(*tensors, counts, growing, True, steps, growing, 0.9, 0.99, 1e-8, 1)
    with pytest.raises(RuntimeError, match="adam_deferred: last has a row"):
        rows = torch.tensor([0, 1])
        torch.ops.teracon_fast.adam_deferred(
            *tensors, counts, rows, torch.ones(2, 4), steps, growing, 0.9, 0.99, 1e-8, 0, 1
        )
    with pytest.raises(RuntimeError, match="adam_deferred: expected the numbers of the step"):
        torch.ops.teracon_fast.adam_deferred(
            *tensors, counts, rows, torch.ones(2, 4), steps[:0], growing, 0.9, 0.99, 1e-8, 0, 1
        )
    for at in (-1, 1):
        with pytest.raises(RuntimeError, match="adam_step: expected steps"):
            torch.ops.teracon_fast.adam_step(steps, at, 1.0, 1.0)
    assert all(torch.equal(t, torch.ones(2, 4)) for t in (*tensors, steps[[0, 0]]))


@COMPILED
def test_products_that_stand_for_a_division_are_proven() -> None:
    """All significands of dividends by the roots of some steps, and those roots for which products fail found out."""
    mantissas = torch.arange(1 << 23, 1 << 24).float()
    steps = torch.empty(400, 4)
    for t in range(400):
        torch.ops.teracon_fast.adam_step(steps, t, 1.0, (1 - 0.999 ** (t + 1)) ** 0.5)
    proven = ~steps[:, 3].isnan()
    assert 300 < int(proven.sum())
    for t in (*proven.nonzero()[::60, 0].tolist(), *(~proven).nonzero()[:4, 0].tolist()):
        root, high = steps[t, 1], steps[t, 2]
        low = (1 / root.double() - high.double()).float()
        # A fused multiply-add: products of floats are exact in float64, and its sum is rounded to odd before it becomes a float.
        product, addend = mantissas.double() * high.double(), (mantissas * low).double()
        total = product + addend
        error = addend - (total - product)
        bits = total.view(torch.int64)
        total = torch.where((error != 0) & (bits & 1 == 0), bits + torch.where(error > 0, 1, -1), bits).view(torch.float64)
        assert bool((total.float() == mantissas / root).all()) == bool(proven[t])
