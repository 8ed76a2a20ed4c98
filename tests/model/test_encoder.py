"""Inference on blocks of users: the same states as the packed pass, for any lengths, channels and taps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from instruction_sets import INSTRUCTION_SETS, passes_under
from torch import Tensor

from teracon_fast import FastTCN, Request, env_report
from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.model import fast_tcn
from teracon_fast.model.encoder import Encoder

needs_kernels = pytest.mark.skipif(
    "cpu" not in env_report()["backends"]["masked_conv"], reason="this installation has no compiled extension"
)
S = 3.0


def network(channels: int = 20, dilations: tuple[int, ...] = (1, 2), kernel_size: int = 3) -> FastTCN:
    torch.manual_seed(2)
    model = FastTCN(num_items=40, channels=channels, labels=[40, 5, 3], dilations=dilations, kernel_size=kernel_size)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".ln" in name:
                value += 0.3 * torch.randn_like(value)
            if name == "embeding.weight":
                value.normal_()
    return model


def users(count: int, length: int) -> Tensor:
    """Sequences of every real length from 0 to `length`, in turn, with a pad in the middle of some."""
    x = torch.randint(1, 40, (count, length))
    x[torch.arange(length) < (length - torch.arange(count) % (length + 1))[:, None]] = 0
    x[3::5, length // 2] = 0
    return x


def packed_pass(model: FastTCN, x: Tensor, task: int, drop_last: int) -> Tensor:
    with torch.enable_grad():  # the encoder serves calls without gradient only
        return model.encode(x, [Request(task, None, drop_last)], S)[0].detach()


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@needs_kernels
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@pytest.mark.parametrize("drop_last", [0, 1, 4])
@pytest.mark.parametrize(
    ("channels", "dilations", "length"), [(20, (1, 2), 13), (33, (1, 4, 1), 30), (5, (3,), 40), (64, (1, 2), 5)]
)
def test_states_are_those_of_the_packed_pass(
    algorithm: str, drop_last: int, channels: int, dilations: tuple[int, ...], length: int
) -> None:
    """Sequences longer and shorter than the receptive field; within twice the error of the packed pass in float32."""
    model = network(channels, dilations)
    model.algorithm = algorithm
    x = users(70, length)
    got = Encoder(model, model.masks(S)).encode(x, 1, drop_last)
    exact = packed_pass(network(channels, dilations).double(), x, 1, drop_last)
    assert distance(got, exact) <= 2 * distance(packed_pass(model, x, 1, drop_last), exact) + 1e-6


@needs_kernels
@pytest.mark.parametrize("kernel_size", [2, 4])
def test_other_numbers_of_taps(kernel_size: int) -> None:
    model, x = network(kernel_size=kernel_size), users(40, 17)
    assert distance(Encoder(model, model.masks(S)).encode(x, 0), packed_pass(model, x, 0, 0)) < 1e-5


@needs_kernels
def test_bfloat16_rows_are_near() -> None:
    model, x = network(48), users(70, 17)
    got, exact = Encoder(model, model.masks(S), precision="bf16").encode(x, 2), packed_pass(model, x, 2, 0)
    assert got.dtype == torch.float32 and 0 < distance(got, exact) < 0.03
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = model.encode(x, [Request(2)], S)[0]
    assert cast.dtype == torch.bfloat16 and distance(cast, exact) < 0.03


@needs_kernels
def test_blocks_threads_and_neighbours_change_nothing() -> None:
    """Many blocks of users, one user alone, all of them on three threads: the same bits."""
    model, x = network(16, (1, 4)), users(900, 30)
    encoder = Encoder(model, model.masks(S))
    together = encoder.encode(x, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(encoder.encode(x, 1), together)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([encoder.encode(x[i : i + 1], 1) for i in range(35)]), together[:35])


@needs_kernels
def test_no_users_and_nothing_but_pads() -> None:
    model = network()
    encoder = Encoder(model, model.masks(S))
    assert encoder.encode(torch.zeros(0, 9, dtype=torch.int64), 0).shape == (0, 20)
    x = torch.zeros(3, 9, dtype=torch.int32)
    torch.testing.assert_close(encoder.encode(x, 0), packed_pass(model, x, 0, 0))


@needs_kernels
def test_a_call_without_gradient_uses_it_and_gives_each_request_its_users(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), users(90, 13)
    requests = [Request(0, torch.arange(0, 90, 2), 1), Request(2), Request(1, torch.tensor([5, 5, 0]))]
    expected = [part.detach() for part in model.encode(x, requests, S)]
    calls: list[int] = []
    real = Encoder.encode

    def counted(self: Encoder, x: Tensor, *rest: object) -> Tensor:
        calls.append(len(x))
        return real(self, x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Encoder, "encode", counted)
    with torch.no_grad():
        for got, part in zip(model.encode(x.flip(0).flip(0), requests, S), expected, strict=True):
            torch.testing.assert_close(got, part, rtol=1e-4, atol=1e-5)
        assert calls == [45, 90, 3]
        model.encode(x[: fast_tcn.ENCODER_USERS - 1], [Request(0)], S)  # too few to pack weights for
        strided = torch.stack([x, -x], -1)[..., 0]
        torch.testing.assert_close(model.encode(strided, requests, S)[1], expected[1], rtol=1e-4, atol=1e-5)
    assert calls == [45, 90, 3, 45, 90, 3]


def test_it_works_without_the_kernels() -> None:
    model, x = network().double(), users(20, 13)
    assert not Encoder.serves(model)
    torch.testing.assert_close(model.encoder(S)(x, 1, 1), packed_pass(model, x, 1, 1))
    with pytest.raises(ConfigError, match="needs float32 parameters on the CPU and the backend 'cpu'"):
        Encoder(model, model.masks(S))


@needs_kernels
def test_what_does_not_fit_is_refused() -> None:
    model, x = network(), users(20, 13)
    encoder = Encoder(model, model.masks(S))
    with pytest.raises(ShapeError, match="x is torch.float32"):
        encoder.encode(x.float(), 0)
    with pytest.raises(ShapeError, match="drop_last is 13, expected 0 to 12"):
        encoder.encode(x, 0, 13)
    with pytest.raises(ShapeError, match=r"one number in 0\.\.13 per sequence"):
        encoder.encode(x, 0, 0, np.full(20, 14))
    with pytest.raises(ConfigError, match=r"task is 3, expected 0\.\.2"):
        encoder.encode(x, 3)
    with pytest.raises(ConfigError, match="precision is 'fp16'"):
        Encoder(model, model.masks(S), precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="masks are"):
        Encoder(model, torch.ones(2, 3, 20))
    for stranger in (40, -1):
        x[2, -1] = stranger
        with pytest.raises(RuntimeError, match=f"x has item {stranger} in row 2, out of range: expected 0 to 39"):
            encoder.encode(x, 0)


@needs_kernels
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_that_this_machine_has(isa: str) -> None:
    """The whole of this file again, in a process that is told which kernels to use."""
    passes_under(isa, __file__, "not instruction_set")
