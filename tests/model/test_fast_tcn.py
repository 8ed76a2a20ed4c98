"""FastTCN: agreement with the dense reference on many shapes, the published interface, ordinary nn.Module behavior."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dense_check import assert_close, gradients, ragged, twins
from torch import nn

from teracon_fast import FastTCN, Request
from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.reference.model import ReferenceTCN

PARA = {
    "item_size": 30, "dilated_channels": 16, "target_item_size": [30, 7, 5], "dilations": [1, 4], "kernel_size": 3,
    "learning_rate": 0.001, "batch_size": 5, "task_embs": [0, 2], "num_task": 3,
}  # fmt: skip
T1_PARA = {key: value for key, value in PARA.items() if key not in ("num_task", "target_item_size")}


@pytest.mark.parametrize(
    ("channels", "length", "dilations", "labels"),
    [
        (40, 20, (1, 4), [30, 7]),
        (48, 60, (1, 2, 4, 8), [30, 7, 5]),
        (64, 150, (1, 4) * 4, [30, 7, 5, 3, 2]),
        (256, 100, (1, 4) * 4, [30, 2000, 8]),
    ],
)
@pytest.mark.parametrize("onecall", [True, False])
def test_published_call_equals_dense_in_float32(
    channels: int, length: int, dilations: Sequence[int], labels: list[int], onecall: bool
) -> None:
    """Judged by the error that the dense network itself makes in float32, outputs and gradients together per kind."""
    fast, dense = twins(labels, channels, dilations=dilations)
    task, exact, fast, dense = len(labels) - 1, dense, fast.float(), copy.deepcopy(dense).float()
    x = ragged([0, 1, length // 3, length - 1, length], length)
    weight = torch.randn(5 if onecall else 5 * length, labels[-1])
    logits, grads = [], []
    for model in (exact, dense, fast):
        out, _ = model(x, 2.0, [], task, 0, onecall=onecall, new_task=task)
        (out * weight.to(out.dtype)).sum().backward()
        logits.append(out.detach().double())
        grads.append({name: gradient.double() for name, gradient in gradients(model).items()})
    assert (logits[2] - logits[0]).norm() <= 2 * (logits[1] - logits[0]).norm() + 1e-7 * logits[0].norm()
    assert grads[2].keys() == grads[0].keys()

    def error(kind: str, side: int) -> float:
        names = [name for name in grads[0] if kind in name]
        return sum(float((grads[side][n] - grads[0][n]).square().sum()) for n in names) ** 0.5

    for kind in ("embeding", "conv", "ln", "ec", "mlp", "classifier"):
        truth = sum(float(g.square().sum()) for n, g in grads[0].items() if kind in n) ** 0.5
        assert error(kind, 2) <= 2 * error(kind, 1) + 1e-6 * truth, kind


def test_one_seed_gives_the_published_initial_weights() -> None:
    """Modules are initialized in the published order; ReferenceTCN is checked against it elsewhere."""
    for para in (PARA, T1_PARA):
        torch.manual_seed(3)
        fast = FastTCN(para).state_dict()
        torch.manual_seed(3)
        dense = ReferenceTCN(para).state_dict()
        assert list(fast) == list(dense)
        assert all(torch.equal(fast[name], dense[name]) for name in fast)


def test_masks_list_is_extended_in_place_with_rows_in_network_order() -> None:
    model = FastTCN(PARA)
    before = torch.zeros(1)
    given = [before]
    _, returned = model(ragged([3], 5), 1.0, given, 1, "cpu", onecall=True, new_task=2)
    assert returned is given and given[0] is before
    assert [tuple(mask.shape) for mask in given[1:]] == [(1, 16)] * 4
    torch.testing.assert_close(torch.cat(given[1:]), model.masks(1.0)[:, 1])


def test_plain_mask_only_for_the_past_task_of_the_second_task() -> None:
    model = FastTCN({**PARA, "num_task": 2})
    x = ragged([3], 5)

    def mask(task: int, **call: object) -> torch.Tensor:
        return torch.cat(model(x, 1.0, [], task, 0, onecall=True, **call)[1])

    plain, relation = model.masks(1.0, plain=True), model.masks(1.0)
    torch.testing.assert_close(mask(0, new_task=1), plain[:, 0])
    torch.testing.assert_close(mask(0, new_task=1, backward=True), relation[:, 0])
    torch.testing.assert_close(mask(1, new_task=1), relation[:, 1])
    torch.testing.assert_close(mask(0, new_task=2), relation[:, 0])


def test_parameters_that_a_call_does_not_use_get_no_gradient() -> None:
    model = FastTCN(PARA)
    model(ragged([3, 5], 5), 1.0, [], 1, 0, onecall=True, new_task=2)[0].sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    expected = {n for n, _ in model.named_parameters() if ".mlp" in n and ".1." not in n.split("mlp")[1]}
    assert without == expected | {f"task_classifier.{t}.{kind}" for t in (0, 2) for kind in ("weight", "bias")}


def test_published_teacher_has_the_labels_of_all_tasks_but_heads_for_its_own() -> None:
    assert FastTCN({**PARA, "num_task": 2}).labels == [30, 7]


def test_drop_last_is_the_state_of_the_shortened_sequence() -> None:
    fast, dense = twins([30, 7], 8)
    x = ragged([0, 1, 2, 12], 12)
    (got,) = fast.encode(x, [Request(0, drop_last=1)], s=3.0)
    torch.testing.assert_close(got, dense.hidden(x[:, :-1], dense.all_masks(3.0)[:, 0])[:, -1])


def test_next_item_loss_counts_pads_and_merges_them() -> None:
    torch.manual_seed(0)
    model = FastTCN(T1_PARA).double()
    dense = ReferenceTCN(T1_PARA).double()
    dense.load_state_dict(model.state_dict())
    x = ragged([0, 1, 4, 9], 9)
    loss = model.next_item_loss(x, s=2.0)
    logits, _ = dense(x[:, :-1], 2.0, [], 0)
    expected = F.cross_entropy(logits, x[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.next_item_loss(x, s=2.0, lengths=np.array([0, 1, 4, 9])), loss)
    loss.backward()
    expected.backward()
    assert_close(gradients(model), gradients(dense), 1e-10)
    assert model.encode_all(x[:, :-1]).hidden.shape[0] < 4 * 8


def test_extended_keeps_the_network_and_renews_the_relations() -> None:
    old = FastTCN(num_items=30, channels=8, labels=[30, 7], dilations=[1])
    state = torch.random.get_rng_state()
    first = old.extended(4, torch.Generator().manual_seed(5))
    second = old.extended(4, torch.Generator().manual_seed(5))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.labels == [30, 7, 4]
    for name, value in old.state_dict().items():
        if ".mlp" in name:
            assert first.state_dict()[name].shape != value.shape or name.endswith("bias")
        else:
            assert torch.equal(first.state_dict()[name], value)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.blocks[0].relation_weights(0)[0].weight.shape == (1, 5)
    new = first.blocks[0].task_embeddings[2]
    assert bool(((new >= 0) & (new <= 2)).all())
    with torch.no_grad():
        first.embeding.weight.zero_()
    assert bool(old.embeding.weight.any()), "extended() must not share memory with the model it came from"


def test_training_after_inference_mode() -> None:
    """Nothing that a first call under inference_mode leaves behind may stand in the way of gradients."""
    model = FastTCN(num_items=30, channels=8, labels=[30, 7, 4, 3], dilations=[2], mask="positive_only")
    x = ragged([3, 5], 5)
    with torch.inference_mode():
        model.encode(x, [Request(3)])
    model.encode(x, [Request(3)])[0].sum().backward()
    assert model.embeding.weight.grad is not None


def test_single_native_task_has_no_relation_weights() -> None:
    model = FastTCN(num_items=30, channels=8, dilations=[1])
    assert not model.has_relation and model.labels == [30]
    assert set(model.state_dict()) == set(FastTCN({**T1_PARA, "dilated_channels": 8, "dilations": [1]}).state_dict())


def test_deepcopy_pickle_and_frozen() -> None:
    model = FastTCN(PARA)
    x = ragged([3, 5], 5)
    expected = model(x, 1.0, [], 1, 0, onecall=True)[0]
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    loaded = FastTCN(PARA)
    loaded.load_state_dict(torch.load(stored, weights_only=True))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.frozen(), loaded):
        assert torch.equal(copied(x, 1.0, [], 1, 0, onecall=True)[0], expected)
    assert not any(p.requires_grad for p in model.frozen().parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_to_double_and_autocast() -> None:
    model = FastTCN(PARA)
    x = ragged([3, 5], 5)
    exact = model(x, 1.0, [], 1, 0, onecall=True)[0]
    assert model.double()(x, 1.0, [], 1, 0, onecall=True)[0].dtype == torch.float64
    model = model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x, 1.0, [], 1, 0, onecall=True)[0]
    assert low.dtype == torch.bfloat16
    assert float((low.float() - exact).norm()) < 0.05 * float(exact.norm())
    low.float().sum().backward()
    assert model.embeding.weight.grad is not None and model.embeding.weight.grad.dtype == torch.float32


def test_distributed_data_parallel(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = FastTCN(PARA)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
        x = ragged([3, 5], 5)
        for module in (model, wrapped):
            module(x, 1.0, [], 1, 0, onecall=True)[0].square().sum().backward()
        assert_close(gradients(wrapped.module), gradients(model), 1e-6)
    finally:
        dist.destroy_process_group()


def test_inputs_of_any_layout_and_integer_type() -> None:
    model = FastTCN(PARA)
    x = ragged([3, 5, 0], 6)
    expected = model(x, 1.0, [], 1, 0, onecall=True)[0]
    for same in (x.t().contiguous().t(), torch.stack([x, x], -1)[..., 0], x.int()):
        assert torch.equal(model(same, 1.0, [], 1, 0, onecall=True)[0], expected)
    one = model(x[:1].expand(4, -1), 1.0, [], 1, 0, onecall=True)[0]
    torch.testing.assert_close(one, expected[:1].expand(4, -1))


def test_known_lengths_may_be_given() -> None:
    model = FastTCN(PARA)
    x = ragged([3, 5, 0], 6)
    lengths = torch.tensor([3, 5, 0]).numpy()
    assert torch.equal(model.encode(x, [Request(1)], lengths=lengths)[0], model.encode(x, [Request(1)])[0])


def test_bad_calls_are_refused_with_got_and_expected() -> None:
    model = FastTCN(PARA)
    x = ragged([3], 5)
    with pytest.raises(ShapeError, match=r"x is torch.float32 \[1, 5\], expected int64"):
        model(x.float(), 1.0, [], 0, 0)
    with pytest.raises(ShapeError, match=r"\[B, L\]"):
        model(x[0], 1.0, [], 0, 0)
    with pytest.raises(ConfigError, match="task is 3, expected 0..2"):
        model(x, 1.0, [], 3, 0)
    with pytest.raises(ConfigError, match="task is -1"):
        model.encode(x, [Request(-1)])
    with pytest.raises(ShapeError, match="users 5..5, expected 0..0"):
        model.encode(x, [Request(0, torch.tensor([5]))])
    with pytest.raises(ShapeError, match="at least 2"):
        model.next_item_loss(x[:, :1])
    with pytest.raises(IndexError):
        model(x + 30, 1.0, [], 0, 0)
    with pytest.raises(ShapeError, match="length is 0"):
        model(x[:, :0], 1.0, [], 0, 0)
    with pytest.raises(ShapeError, match="masks have 3 sites, expected 4"):
        model.encode(x, [Request(0)], masks=model.masks(1.0)[:3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs num_items"),
        ({"model_para": {"item_size": 3}}, "lacks .*dilated_channels"),
        ({"model_para": {**PARA, "target_item_size": [30]}}, r"target_item_size is \[30\], expected one size for each of 3"),
        ({"model_para": PARA, "num_items": 3}, "got both"),
        ({"num_items": 0}, "num_items is 0"),
        ({"num_items": 3, "labels": []}, "labels are"),
        ({"num_items": 3, "labels": [3, 0]}, "labels are"),
        ({"num_items": 3, "dilations": [0]}, "dilations are"),
        ({"num_items": 3, "kernel_size": 1}, "kernel_size is 1"),
        ({"num_items": 3, "mask": "both"}, "mask variant is 'both', expected one of"),
        ({"num_items": 3, "backend": "fast"}, "backend 'fast' cannot run masked_conv"),
    ],
)
def test_bad_constructions_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastTCN(**arguments)


def test_grown_keeps_what_there_is_and_adds_rows_as_a_new_model_has_them() -> None:
    old = FastTCN(num_items=30, channels=64, labels=[30, 7, 30], dilations=[1, 2]).double()
    old.head(1).requires_grad_(False)
    new = old.grown(2030, generator=torch.Generator().manual_seed(5))
    assert new.num_items == new.embeding.num_embeddings == 2030 and new.labels == [2030, 7, 30], "task 3's labels are its own"
    before, after = old.state_dict(), new.state_dict()
    assert before.keys() == after.keys()
    grown = {"embeding.weight", "task_classifier.0.weight", "task_classifier.0.bias"}
    for name, value in before.items():
        assert torch.equal(after[name][:30] if name in grown else after[name], value), name
        assert (len(after[name]) == 2030) == (name in grown)
    items, weight, bias = (after[name][30:].float() for name in sorted(grown, key=list(after).index))
    bound = (1 / 2030) ** 0.5
    assert float(items.abs().max()) <= bound and float(items.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert float(weight.mean()) == pytest.approx(0, abs=2e-4) and float(weight.std()) == pytest.approx(0.01, rel=0.02)
    assert bool((bias == 0.1).all())
    assert not new.head(1).weight.requires_grad and new.head(0).weight.requires_grad
    x = ragged([0, 3, 5], 5)
    assert torch.equal(new.encode(x, [Request(2)])[0], old.encode(x, [Request(2)])[0])
    with torch.no_grad():
        new.embeding.weight.zero_()
    assert bool(old.embeding.weight.any()), "grown() must not share memory with the model it came from"
    (new.head(0)(new.encode(x + 2000, [Request(0)])[0])).sum().backward()
    assert new.embeding.weight.grad is not None and bool(new.embeding.weight.grad[2000:].any())


def test_models_of_one_sequence_of_tasks_get_the_same_rows() -> None:
    first = FastTCN(num_items=30, channels=8, labels=[30, 7], dilations=[1])
    second = first.extended(4)
    one, other = (
        model.grown(40, [40, 9, 6][: model.num_tasks], torch.Generator().manual_seed(3)) for model in (first, second)
    )
    assert other.labels == [40, 9, 6]
    for name in ("embeding.weight", "task_classifier.0.weight", "task_classifier.1.weight"):
        assert torch.equal(one.state_dict()[name], other.state_dict()[name]), name
    state = torch.random.get_rng_state()
    first.grown(40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.grown(30).embeding.weight, first.embeding.weight), "growing by nothing is a copy"


@pytest.mark.parametrize("para", [PARA, T1_PARA, {**PARA, "num_task": 2}])
def test_grown_published_form_is_built_by_its_own_dict(para: dict) -> None:
    new = FastTCN(para).grown(35)
    assert new.model_para is not None and new.model_para["item_size"] == 35 and para["item_size"] == 30
    if "num_task" in para:
        assert new.model_para["target_item_size"] == [35, 7, 5] and para["target_item_size"] == [30, 7, 5]
    again = FastTCN(new.model_para)
    again.load_state_dict(new.state_dict())
    x = ragged([3, 5], 5, items=35)
    call = {"onecall": True, "new_task": 0}
    assert torch.equal(again(x, 1.0, [], 0, 0, **call)[0], new(x, 1.0, [], 0, 0, **call)[0])


def test_shrinking_is_refused() -> None:
    model = FastTCN(num_items=30, channels=8, labels=[30, 7], dilations=[1])
    with pytest.raises(ConfigError, match="num_items is 29, expected at least the 30 that there are"):
        model.grown(29)
    with pytest.raises(ConfigError, match=r"labels are \[31, 6\], expected one count a task, at least \[30, 7\]"):
        model.grown(31, [31, 6])
    with pytest.raises(ConfigError, match=r"labels are \[31\], expected one count a task"):
        model.grown(31, [31])
    with pytest.raises(ConfigError, match="labels of task 1 are 30, expected 31: its head covers the items"):
        model.grown(31, [30, 7])


def test_zeros_inside_a_sequence_are_items_like_any_other() -> None:
    """Left pads are shared; a 0 after the first real item is not one of them, nor is one at the end."""
    fast, dense = twins([30, 7], 8)
    x = ragged([12, 12, 7, 5, 1, 0], 12)
    x[0, [3, 4, 8]], x[1, -1], x[2, 5:7], x[3, -1], x[4, -1] = 0, 0, 0, 0, 0
    x[5, 6] = 3
    for task, drop in ((0, 1), (1, 0)):
        seen = x[:, : 12 - drop]
        expected = dense.hidden(seen, dense.all_masks(3.0)[:, task])
        (got,) = fast.encode(x, [Request(task, drop_last=drop)], s=3.0)
        torch.testing.assert_close(got, expected[:, -1], rtol=1e-10, atol=1e-10)
        everything = fast.encode_all(seen, task, s=3.0)
        torch.testing.assert_close(everything.hidden[everything.row_of], expected, rtol=1e-10, atol=1e-10)
    many, single = x.repeat(16, 1), dense.float()
    with torch.no_grad():  # so many users without gradient go through the encoder
        (got,) = fast.float().encode(many, [Request(1)], s=3.0)
        torch.testing.assert_close(got, single.hidden(many, single.all_masks(3.0)[:, 1])[:, -1], rtol=1e-4, atol=1e-5)
