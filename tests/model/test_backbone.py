"""A backbone without masks of its own: other weights, other convolutions, and the encoder in place of packed rows."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_check import ragged
from torch import Tensor

from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.model.backbone import Backbone
from teracon_fast.optim.adam import Adam
from teracon_fast.reference.model import causal_conv
from teracon_fast.train.loop import make_optimizer

LENGTHS = [9, 0, 3, 5, 9, 1, 7]


def backbone(dtype: torch.dtype = torch.float64, backend: str = "auto") -> Backbone:
    """Two blocks, all parameters off their initial values."""
    model = Backbone(30, 8, (1, 2), 3, backend)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def other_weights(model: Backbone) -> list[Tensor]:
    return [torch.randn_like(model.site(number)[0].weight).requires_grad_() for number in range(model.num_sites)]


def with_weights(model: Backbone, weights: list[Tensor]) -> Backbone:
    """A copy that has them as its own."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for number, weight in enumerate(weights):
            model.site(number)[0].weight.copy_(weight)
    return model


def test_given_weights_stand_in_for_the_own_ones() -> None:
    model = backbone()
    weights, x = other_weights(model), ragged(LENGTHS, 9)
    copied = with_weights(model, weights)
    for drop in (0, 1):
        assert torch.equal(model.represent(x, None, drop, weights=weights), copied.represent(x, None, drop))
    one, two = model.positions(x, weights=weights), copied.positions(x)
    assert torch.equal(one.hidden, two.hidden) and torch.equal(one.row_of, two.row_of)
    one.hidden.square().sum().backward()
    two.hidden.square().sum().backward()
    for number, weight in enumerate(weights):
        assert torch.equal(weight.grad, copied.site(number)[0].weight.grad)
        assert model.site(number)[0].weight.grad is None
    assert torch.equal(model.embeding.weight.grad, copied.embeding.weight.grad)


def test_without_gradient_many_users_are_encoded_by_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone(torch.float32)
    weights = other_weights(model)
    masks = torch.rand(model.num_sites, 1, 8)
    x = ragged([LENGTHS[i % 7] for i in range(100)], 9)
    module = sys.modules["teracon_fast.model.backbone"]
    made: list[Any] = []
    plain = module.Encoder

    class Counted(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            made.append(options)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(module, "Encoder", Counted)
    served = plain.serves(model)
    for chosen in (None, weights):
        for given in (None, masks):
            for drop in (0, 1):
                exact = copy.deepcopy(model).double()
                wide = None if chosen is None else [weight.double() for weight in chosen]
                expected = exact.represent(x, None if given is None else given.double(), drop, weights=wide)
                before = len(made)
                with torch.no_grad():
                    found = model.represent(x, given, drop, weights=chosen)
                assert len(made) - before == int(served)
                torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    model.represent(x)
    with torch.no_grad():
        model.represent(x[:10])
        before = len(made)
        model.represent(x, convolve=model.convolve)
    assert len(made) == before, "few users, a gradient or another convolution: packed rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_encoder_computes_its_constants_once_and_serves_any_number_of_users(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled encoder where it serves, else packed rows: the states of `represent` with a gradient."""
    model = backbone(dtype)
    weights, masks = other_weights(model), torch.rand(model.num_sites, 1, 8, dtype=dtype)
    x = ragged([LENGTHS[i % 7] for i in range(100)], 9)
    module = sys.modules["teracon_fast.model.backbone"]
    made: list[Any] = []
    plain = module.Encoder.__init__
    monkeypatch.setattr(module.Encoder, "__init__", lambda self, *a, **o: (made.append(o), plain(self, *a, **o))[1])
    for given, chosen in ((None, None), (masks, weights)):
        before = len(made)
        encode = model.encoder(given, chosen)
        for users in (100, 3, 0):
            for drop in (0, 1):
                expected = model.represent(x[:users], given, drop, weights=chosen)
                found = encode(x[:users], drop)
                assert found.dtype == dtype and not found.requires_grad
                torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
        assert len(made) - before == int(module.Encoder.serves(model))


def test_an_encoder_takes_another_convolution_and_bfloat16() -> None:
    model, x = backbone(torch.float32), ragged(LENGTHS, 9)

    def doubled(*arguments: Any, **options: Any) -> Tensor:
        return 2 * model.convolve(*arguments, **options)

    expected = model.represent(x, convolve=doubled).detach()
    assert torch.equal(model.encoder(convolve=doubled)(x), expected)
    for given, exact in ((None, model.represent(x).detach()), (doubled, expected)):
        low = model.encoder(convolve=given, precision="bf16")(x)
        assert low.dtype == torch.float32 and 0 < float((low - exact).norm() / exact.norm()) < 0.05
    with pytest.raises(ConfigError, match="precision is 'fp16'"):
        model.encoder(precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="weights of 3 convolutions, expected 4"):
        model.encoder(weights=other_weights(model)[:3])


def test_another_convolution_runs_in_place_of_each() -> None:
    """One that leaves the ReLU out, against a dense form of it."""
    model, x = backbone(), ragged(LENGTHS, 9)
    seen: list[int] = []

    def linear(
        site: int, x: Tensor, mask: Tensor, table: Any, residual: Tensor | None = None, residual_table: Any = None,
        weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        seen.append(site)
        conv, norm = model.site(site)
        padded = torch.cat([x, x.new_zeros(1, 8)])
        taps = [padded[table.taps[:, k].long()] @ conv.weight[:, :, 0, k].T for k in range(3)]
        out = F.layer_norm(sum(taps) + conv.bias, (8,), norm.weight, norm.bias, norm.eps)
        return out if residual is None else out + residual[residual_table.rows.long()]

    found = model.represent(x, convolve=linear)
    hidden = F.embedding(x, model.embeding.weight)
    for i, dilation in enumerate((1, 2)):
        inner = hidden
        for number in (2 * i, 2 * i + 1):
            conv, norm = model.site(number)
            inner = causal_conv(inner, conv.weight, conv.bias, dilation * (1 + number % 2))
            inner = F.layer_norm(inner, (8,), norm.weight, norm.bias, norm.eps)
        hidden = hidden + inner
    assert seen == [0, 1, 2, 3]
    torch.testing.assert_close(found, hidden[:, -1], rtol=1e-10, atol=1e-10)


def test_a_subclass_changes_how_a_convolution_runs() -> None:
    class Doubled(Backbone):
        def convolve(self, site: int, *arguments: Any, **options: Any) -> Tensor:
            return 2 * super().convolve(site, *arguments, **options)

    model = Doubled(30, 8, (1, 2), 3)
    with torch.no_grad():
        x = ragged(LENGTHS * 12, 9)
        many, few = model.represent(x), model.represent(x[:7])
    assert not torch.allclose(few, Backbone.represent(_as_plain(model), x[:7]))
    torch.testing.assert_close(many[:7], few, rtol=1e-5, atol=1e-5)


def _as_plain(model: Backbone) -> Backbone:
    plain = Backbone(30, 8, (1, 2), 3)
    plain.load_state_dict(model.state_dict())
    return plain


def test_wrong_numbers_of_weights_and_masks_are_refused() -> None:
    model, x = backbone(), ragged(LENGTHS, 9)
    with pytest.raises(ShapeError, match="weights of 3 convolutions, expected 4"):
        model.represent(x, weights=other_weights(model)[:3])
    with pytest.raises(ShapeError, match="masks have 3 sites, expected 4"):
        model.represent(x, model.no_masks()[:3])


def test_an_optimizer_of_some_parameters() -> None:
    """Groups keep a rate of their own; an item embedding that is not among them keeps dense gradients."""
    module = torch.nn.ModuleList([backbone(torch.float32), backbone(torch.float32)])
    first, second = module
    groups = [{"params": list(first.parameters())}, {"params": [second.site(0)[0].weight], "lr": 0.5}]
    optimizer = make_optimizer(module, 0.1, groups)
    assert isinstance(optimizer, Adam) and [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    assert not second.sparse_embedding_grad
    before = [second.site(i)[0].weight.detach().clone() for i in range(2)]
    for model in module:
        model.represent(ragged(LENGTHS, 9)).sum().backward()
    assert first.embeding.weight.grad.is_sparse == first.sparse_embedding_grad
    assert not second.embeding.weight.grad.is_sparse
    optimizer.step()
    moved = (second.site(0)[0].weight - before[0]).abs().max()
    assert 0.4 < float(moved.detach()) < 0.6
    assert torch.equal(second.site(1)[0].weight, before[1])
