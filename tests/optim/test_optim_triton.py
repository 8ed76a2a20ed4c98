"""Adam by its Triton kernels: on a GPU where there is one, else in Triton's interpreter, beside PyTorch's on dense gradients."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from steps import t1_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_here import require_triton

from teracon_fast import FastTCN, env_report, ops
from teracon_fast.errors import ConfigError
from teracon_fast.ops import backends
from teracon_fast.ops.backends import BackendError
from teracon_fast.optim import lazy_rows
from teracon_fast.optim.adam import Adam
from teracon_fast.train import loop
from teracon_fast.train.loop import make_optimizer

require_triton()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOMENTS = ("exp_avg", "exp_avg_sq")
V = 40
Make = Callable[..., Adam]
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(params=[False, True], ids=["all rows", "lazy"])
def adam(request: pytest.FixtureRequest) -> Make:
    """Makes our Adam by the Triton kernels."""
    return partial(Adam, lazy=request.param, backend="triton")


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape).to(DEVICE))


def gradients(shape: tuple[int, ...], steps: int) -> Iterator[Tensor]:
    """Of few rows, in any order and repeated: none, one, the same one often; the last quarter of the rows never has one."""
    for step in range(steps):
        count = (12, 0, 1, 8)[step % 4]
        rows = torch.randint(0, max(1, shape[0] * 3 // 4), (count,)) if step % 4 < 3 else torch.full((count,), 2 % shape[0])
        yield torch.sparse_coo_tensor(rows[None], torch.randn(count, *shape[1:]), shape, check_invariants=True).to(DEVICE)


def assert_same(got: Tensor, expected: Tensor) -> None:
    """The same bits."""
    assert got.dtype == expected.dtype and torch.equal(got.detach(), expected.detach())


def twin(mine: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(mine.detach().clone())


@pytest.mark.parametrize("shape", [(V, 20), (V,), (10, 3, 5), (1, 8)])
def test_steps_are_close_to_torchs(adam: Make, shape: tuple[int, ...]) -> None:
    mine = parameter(*shape)
    other = twin(mine)
    ours, theirs = adam([mine], lr=1e-2), torch.optim.Adam([other], lr=1e-2, fused=False)
    for step, gradient in enumerate(gradients(shape, 8)):
        mine.grad, other.grad = gradient, gradient.to_dense()
        if step == 5:
            ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 3e-4
        ours.step()
        theirs.step()
        if step in (2, 7):
            ours.flush()
            torch.testing.assert_close(mine, other, **CLOSE)
    for name in MOMENTS:
        torch.testing.assert_close(ours.state[mine][name], theirs.state[other][name], **CLOSE)
    assert ours.state[mine]["step"] == 8 and list(ours.state_dict()["state"][0]) == list(theirs.state_dict()["state"][0])


def test_lazy_steps_have_the_bits_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beyond the steps that are remembered, with constants that change, and with a dense gradient between."""
    monkeypatch.setattr(lazy_rows, "_MOST_STEPS", 5)
    mine = parameter(V, 20)
    other = twin(mine)
    later, at_once = Adam([mine], lr=1e-2, lazy=True, backend="triton"), Adam([other], lr=1e-2, backend="triton")
    for step, gradient in enumerate(gradients((V, 20), 16)):
        for w, optimizer in ((mine, later), (other, at_once)):
            if step == 9:
                optimizer.param_groups[0]["betas"] = (0.8, 0.95)
            w.grad = gradient.to_dense() if step == 12 else gradient
            optimizer.step()
        if step in (3, 8):
            assert not torch.equal(mine, other), "no row is behind, so nothing is tested"
    later.flush()
    assert_same(mine, other)
    for name in MOMENTS:
        assert_same(later.state[mine][name], at_once.state[other][name])


@pytest.mark.parametrize("fused", [None, True])
def test_a_save_and_a_load_in_the_middle(adam: Make, fused: bool | None) -> None:
    mine = parameter(V, 12)
    again = twin(mine)
    whole, first = adam([mine], lr=1e-2, fused=fused), adam([again], lr=1e-2, fused=fused)
    steps = list(gradients((V, 12), 8))
    for gradient in steps:
        mine.grad = gradient
        whole.step()
    for gradient in steps[:5]:
        again.grad = gradient
        first.step()
    saved = pickle.loads(pickle.dumps(first.state_dict()))
    # A stranger to these kernels takes a step with a dense gradient, and hands the state back.
    stranger = torch.optim.Adam([again], lr=1e-2, fused=fused)
    stranger.load_state_dict(saved)
    assert stranger.state[again]["step"] == 5
    second = adam([again], lr=1e-2, fused=fused)
    second.load_state_dict(stranger.state_dict())
    for gradient in steps[5:]:
        again.grad = gradient
        second.step()
    second.flush(), whole.flush()
    assert_same(mine, again)
    assert second.state[again]["step"] == 8
    copied = pickle.loads(pickle.dumps(second))
    assert copied.backend == "triton" and copied.lazy == second.lazy


class Waits(AssertionError):
    """The host asked the device for something."""


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result, or whose result's size, the host would have to wait for."""

    NAMES = ("_local_scalar_dense", "nonzero", "_unique", "_unique2", "unique_consecutive", "unique_dim", "_coalesce")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in self.NAMES or by_mask:
            raise Waits(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of embeddings whose sums are left to the optimizer, as they are on a GPU."""
    module = importlib.import_module("teracon_fast.ops.embedding_rows.api")  # `ops` has a function of this name
    monkeypatch.setattr(module, "_leaves_sums", lambda grad: True)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("fused", [None, True])
def test_nothing_waits_for_the_device(adam: Make, fused: bool | None) -> None:
    weight = parameter(V, 12)
    items = [torch.randint(0, 9, (20,), device=DEVICE) for _ in range(3)]
    optimizer = adam([weight], fused=fused)

    def train() -> None:
        for batch in items:
            ops.embedding_rows(weight, batch, sparse=True).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.flush()

    with NoWaiting():
        for waits in (lambda: items[0][0].item(), lambda: items[0][items[0] > 2], lambda: items[0].unique()):
            with pytest.raises(Waits):
                waits()
        train()
    if DEVICE == "cuda":  # what the mode cannot know, the driver does
        torch.cuda.set_sync_debug_mode("error")
        try:
            train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.state[weight]["step"] == (6 if DEVICE == "cuda" else 3)


@pytest.mark.parametrize("fused", [None, True])
def test_the_count_of_steps_is_read_again_after_others_changed_it(adam: Make, fused: bool | None) -> None:
    mine = parameter(V, 4)
    other = twin(mine)
    ours, theirs = adam([mine], lr=1e-2, fused=fused), torch.optim.Adam([other], lr=1e-2, fused=False)
    for step, gradient in enumerate(gradients((V, 4), 6)):
        mine.grad, other.grad = gradient.to_dense() if step in (1, 2) else gradient, gradient.to_dense()
        ours.step()
        theirs.step()
        if step == 3:
            for optimizer, w in ((ours, mine), (theirs, other)):
                optimizer.state[w]["step"].fill_(100)
    ours.flush()
    torch.testing.assert_close(mine, other, **CLOSE)
    assert ours.state[mine]["step"] == 102


@pytest.mark.usefixtures("as_on_a_gpu")
def test_gradients_whose_sums_are_left_to_the_optimizer() -> None:
    weight, items, upstream = parameter(V, 6), torch.randint(0, 9, (50,), device=DEVICE), torch.randn(50, 6).to(DEVICE)
    found = []
    for given in (items, items.int()):
        (gradient,) = torch.autograd.grad(ops.embedding_rows(weight, given, sparse=True), weight, upstream)
        assert gradient.layout == torch.sparse_coo and not gradient.is_coalesced() and gradient.shape == weight.shape
        assert torch.equal(gradient._indices()[0], items) and torch.equal(gradient._values(), upstream)
        found.append(gradient)
    (dense,) = torch.autograd.grad(ops.embedding_rows(weight, items), weight, upstream)
    torch.testing.assert_close(found[0].to_dense(), dense)
    for part in (items[:20], items[20:]):  # two passes add up
        ops.embedding_rows(weight, part, sparse=True).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.to_dense().sum(), torch.tensor(300.0, device=DEVICE))
    from teracon_fast.optim.adam import _added_up

    torch.testing.assert_close(_added_up(found[0]), dense)


def test_gradients_in_half_precision(adam: Make) -> None:
    mine = parameter(V, 8)
    mine.grad_dtype = None  # of any dtype
    other = twin(mine)
    ours, theirs = adam([mine], lr=1e-2), torch.optim.Adam([other], lr=1e-2, fused=False)
    for gradient in gradients((V, 8), 4):
        mine.grad = gradient.to(torch.bfloat16)
        other.grad = mine.grad.float().to_dense()
        ours.step()
        theirs.step()
    ours.flush()
    torch.testing.assert_close(mine, other, **CLOSE)


def model_and_optimizer(monkeypatch: pytest.MonkeyPatch, large: bool) -> tuple[FastTCN, Adam]:
    """A model and its optimizer, of backend="triton"; the interpreter, which is slow, runs only Adam's kernels."""
    model = FastTCN(num_items=30, channels=8, dilations=[1, 2], backend="triton").to(DEVICE)
    monkeypatch.setattr(loop, "LAZY_FROM", 1 if large else 10**9)
    optimizer = make_optimizer(model, 1e-2)
    assert optimizer.backend == "triton" and optimizer.lazy == large and model.sparse_embedding_grad
    if DEVICE == "cpu":
        model.backend = "torch"
    return model, optimizer


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("large", [False, True])
def test_training_is_training_with_dense_gradients(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = model_and_optimizer(monkeypatch, large)
    plain = copy.deepcopy(model)
    dense = torch.optim.Adam(plain.parameters(), lr=1e-2, fused=False)
    assert not plain.sparse_embedding_grad
    for step in range(5):
        x = torch.randint(1, 30, (2, 5))
        t1_step(model, optimizer, x, 3.0)
        t1_step(plain, dense, x, 3.0)
        assert model.embeding.stored.grad is not None and model.embeding.stored.grad.is_sparse
        if step == 2:  # a save and a load
            state, moments = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
            model, optimizer = model_and_optimizer(monkeypatch, large)
            model.load_state_dict(state)
            optimizer.load_state_dict(moments)
    behind = [name for name, p in plain.named_parameters() if p is plain.embeding.stored]
    assert behind and torch.allclose(model.embeding.stored, plain.embeding.stored, **CLOSE) != large
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_backends_of_adam() -> None:
    assert env_report()["auto"]["adam"] != "triton" and backends.resolve("triton", "adam", torch.device(DEVICE)) == "triton"
    with pytest.raises(BackendError, match="'cuda' cannot run adam, expected 'auto' or one of"):
        Adam([parameter(4, 2)], backend="cuda")
    gradient = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (4, 2), check_invariants=True).to(DEVICE)
    for dtype, changes, message in (
        (torch.float64, {}, "it runs torch.float32 and torch.bfloat16"), (torch.bfloat16, {}, "got a parameter torch.bfloat16"),
        (torch.float32, {"fused": False}, "fused=False"), (torch.float32, {"foreach": True}, "foreach=True"),
    ):  # fmt: skip
        weight = nn.Parameter(torch.ones(4, 2, dtype=dtype, device=DEVICE))
        weight.grad = gradient.to(dtype)
        with pytest.raises(BackendError, match=message):
            Adam([weight], backend="triton", **changes).step()  # type: ignore[arg-type]
        assert torch.equal(weight, torch.ones_like(weight))
        Adam([weight], lr=0.5, backend="torch", **changes).step()  # type: ignore[arg-type]
        torch.testing.assert_close(weight[:, 0].float(), torch.tensor([1, 0.5, 1, 1], device=DEVICE), rtol=0, atol=2e-3)
    weight = nn.Parameter(torch.ones(2, 4, device=DEVICE).t())
    weight.grad = gradient
    with pytest.raises(BackendError, match=r"of strides \(1, 4\)"):
        Adam([weight], backend="triton").step()
    with pytest.raises(ConfigError, match="got a sparse gradient and"):
        Adam([weight], backend="triton", weight_decay=0.1).step()


def test_auto_and_torch_do_not_run_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from teracon_fast.kernels import adam as kernels

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("a Triton kernel ran")

    monkeypatch.setattr(kernels, "launch", unexpected)
    for backend in ("auto", "torch", "triton"):
        weight = parameter(4, 2)
        optimizer = Adam([weight], backend=backend, lazy=True)
        weight.grad = next(iter(gradients((4, 2), 1)))
        if backend == "triton":
            with pytest.raises(AssertionError, match="a Triton kernel ran"):
                optimizer.step()
        else:
            optimizer.step()
            optimizer.flush()


def test_a_step_is_a_change_that_autograd_sees(adam: Make) -> None:
    weight = parameter(4, 2)
    loss = weight.square().sum()
    weight.grad = next(iter(gradients((4, 2), 1)))
    adam([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
