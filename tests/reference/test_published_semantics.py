"""What the published network does at pads, at the left edge, and with its masks; each a place where a port goes wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.reference import ReferenceTCN
from teracon_fast.reference.step import next_item_loss

PARA = {"item_size": 12, "dilated_channels": 6, "dilations": [1, 4], "kernel_size": 3, "task_embs": [0, 2]}
PUBLISHED_DILATIONS = [1, 4, 1, 4, 1, 4, 1, 4]


def single(**changes: Any) -> ReferenceTCN:
    return ReferenceTCN({**PARA, **changes}).double()


def several(tasks: int, **changes: Any) -> ReferenceTCN:
    return single(num_task=tasks, target_item_size=[12, 5, 4, 3][:tasks], **changes)


def last(model: ReferenceTCN, x: Tensor) -> Tensor:
    return model.hidden(x, model.task_masks(0, 2.0))[:, -1]


def test_pads_flow_through_the_network() -> None:
    """The pad's row is an item like any other: it changes the state of a real last item, and it learns."""
    model, x = single(), torch.tensor([[0, 0, 0, 5, 7]])
    before = last(model, x)
    before.sum().backward()
    assert model.embeding.weight.grad is not None and model.embeding.weight.grad[0].abs().max() > 0
    with torch.no_grad():
        model.embeding.weight[0] += 0.1
    assert not torch.allclose(last(model, x), before)


def test_item_embedding_has_no_padding_index() -> None:
    model = single()
    assert model.embeding.padding_idx is None and model.embeding.weight[0].abs().max() > 0


def test_pad_targets_count_in_the_loss_of_task_1() -> None:
    """The mean runs over all B*(L-1) targets, three of five here being pads."""
    model, x = single(), torch.tensor([[0, 0, 0, 0, 5, 7]])
    logits = model(x[:, :-1], 2.0, [], 0)[0]
    terms = F.cross_entropy(logits, x[0, 1:], reduction="none")
    assert next_item_loss(model, x, 2.0).item() == pytest.approx(terms.sum().item() / 5, rel=1e-14)
    assert abs(terms.mean().item() - terms[3:].mean().item()) > 1e-6


def test_zeros_lie_left_of_the_sequence() -> None:
    """With one item every tap but the last reads a zero vector, so a block is a plain feed-forward layer."""
    model = single(dilations=[4])
    block, masks = model.residual_blocks[0], model.task_masks(0, 2.0)
    x = model.embeding.weight[7]
    h = masks[0] * F.relu(F.layer_norm(block.conv1.weight[:, :, 0, 2] @ x + block.conv1.bias, (6,), eps=1e-8))
    h = masks[1] * F.relu(F.layer_norm(block.conv2.weight[:, :, 0, 2] @ h + block.conv2.bias, (6,), eps=1e-8))
    assert torch.allclose(model.hidden(torch.tensor([[7]]), masks)[0, 0], x + h, rtol=1e-12)


def test_a_pad_on_the_left_is_not_a_zero() -> None:
    model = single()
    assert not torch.allclose(last(model, torch.tensor([[5, 7]])), last(model, torch.tensor([[0, 5, 7]])))


def test_zeros_extend_the_input_of_both_convolutions() -> None:
    """The second convolution reads zeros too, not what the first one would give left of the sequence."""
    model = single(dilations=[1])
    block, x = model.residual_blocks[0], torch.tensor([[3, 9]])
    masks = model.task_masks(0, 2.0)
    embedded = model.embeding(x)[0]
    w1, w2 = block.conv1.weight[:, :, 0], block.conv2.weight[:, :, 0]
    first = [w1[..., 2] @ embedded[0], w1[..., 2] @ embedded[1] + w1[..., 1] @ embedded[0]]
    h = [masks[0] * F.relu(F.layer_norm(z + block.conv1.bias, (6,), eps=1e-8)) for z in first]
    # Dilation 2: the tap before the last position lies left of the sequence.
    z = w2[..., 2] @ h[1] + block.conv2.bias
    expected = embedded[1] + masks[1] * F.relu(F.layer_norm(z, (6,), eps=1e-8))
    assert torch.allclose(model.hidden(x, masks)[0, 1], expected, rtol=1e-12)


@pytest.mark.parametrize("changed", [0, 3, 9])
def test_causal(changed: int) -> None:
    """A position sees itself and what comes before."""
    model, x = several(2), torch.randint(1, 12, (1, 10))
    other = x.clone()
    other[0, changed] = x[0, changed] % 11 + 1
    masks = model.task_masks(1, 2.0)
    same = (model.hidden(x, masks) == model.hidden(other, masks)).all(dim=-1)[0]
    assert same[:changed].all() and not same[changed]


@pytest.mark.parametrize(
    ("dilations", "kernel_size", "field"),
    [(PUBLISHED_DILATIONS, 3, 121), ([1], 3, 7), ([4], 3, 25), ([1, 2, 4, 8], 2, 46)],
)
def test_receptive_field(dilations: list[int], kernel_size: int, field: int) -> None:
    """1 + (K-1) * sum of 3d over the blocks: exactly the last `field` items can change the last state."""
    assert field == 1 + (kernel_size - 1) * sum(3 * d for d in dilations)
    model = single(dilations=dilations, kernel_size=kernel_size, dilated_channels=16)
    x, masks = torch.randint(12, (1, field + 4)), model.task_masks(0, 0.5)
    rows = model.embeding(x).detach().requires_grad_(True)
    state = rows
    for k, block in enumerate(model.residual_blocks):
        state = block(state, masks[2 * k], masks[2 * k + 1])
    state[0, -1].square().sum().backward()
    assert rows.grad is not None
    reached = rows.grad[0].abs().amax(dim=1).nonzero().flatten()
    assert reached.min() == 4


def test_sequences_longer_than_the_receptive_field_forget_their_beginning() -> None:
    model = single(dilations=PUBLISHED_DILATIONS)
    x = torch.randint(12, (2, 121))
    longer = torch.cat([torch.randint(12, (2, 9)), x], dim=1)
    # The oldest state inside the field reads real items in one case and zeros in the other, but outside the field.
    assert not torch.allclose(model.hidden(x, model.task_masks(0, 1.0))[:, 0], last(model, x))
    changed = longer.clone()
    changed[:, :9] = 3
    assert torch.allclose(last(model, longer), last(model, changed), rtol=1e-13)


def test_a_zero_mask_leaves_the_embedding() -> None:
    """Masks lie inside the residual branch, after the ReLU."""
    model, x = single(), torch.randint(12, (2, 8))
    assert torch.equal(model.hidden(x, torch.zeros(4, 6).double()), model.embeding(x))


def test_each_mask_scales_the_output_of_its_own_layer() -> None:
    """Site 2 of the last block scales the last branch; the masks are in network order."""
    model, x = single(), torch.randint(12, (2, 8))
    masks = torch.rand(4, 6).double()
    halved = masks.clone()
    halved[3] /= 2
    without = masks.clone()
    without[3] = 0
    branch = model.hidden(x, masks) - model.hidden(x, without)
    assert torch.allclose(model.hidden(x, halved), model.hidden(x, without) + branch / 2, rtol=1e-12)


def test_layer_norm_epsilon() -> None:
    for block in single().residual_blocks:
        assert block.ln1.eps == block.ln2.eps == 1e-8


PLAIN = [(0, 1, False)]
RELATION = [(0, 1, True), (1, 1, False), (1, 1, True), (0, 2, False), (1, 2, False), (2, 2, False), (0, 0, False)]


@pytest.mark.parametrize(("task", "new_task", "backward"), PLAIN + RELATION)
def test_which_mask_the_published_call_uses(task: int, new_task: int, backward: bool) -> None:
    model, x = several(3), torch.randint(12, (2, 5))
    plain = (task, new_task, backward) in PLAIN
    used: list[Tensor] = []
    model(x, 3.0, used, task, None, True, backward, new_task)
    assert torch.equal(torch.cat(used), model.task_masks(task, 3.0, plain=plain))
    assert not torch.equal(model.task_masks(task, 3.0, plain=True), model.task_masks(task, 3.0))


def test_masks_list_is_extended_in_place_and_returned() -> None:
    model, before = several(2), torch.zeros(1)
    masks = [before]
    returned = model(torch.randint(12, (2, 5)), 3.0, masks, 1, "cpu", onecall=True)[1]
    assert returned is masks and masks[0] is before
    assert [list(mask.shape) for mask in masks[1:]] == [[1, 6]] * 4


def test_all_positions_are_rows_in_user_order_and_onecall_is_the_last() -> None:
    model, x = several(2), torch.randint(12, (3, 5))
    every, only = (model(x, 3.0, [], 1, None, onecall)[0] for onecall in (False, True))
    assert every.shape == (15, 5) and only.shape == (3, 5)
    assert torch.allclose(every.view(3, 5, 5)[:, -1], only, rtol=1e-12)


def test_state_dict_names_and_shapes() -> None:
    shapes = {name: list(value.shape) for name, value in several(3).state_dict().items()}
    block = {
        "conv1.weight": [6, 6, 1, 3], "conv1.bias": [6], "ln1.weight": [6], "ln1.bias": [6],
        "conv2.weight": [6, 6, 1, 3], "conv2.bias": [6], "ln2.weight": [6], "ln2.bias": [6],
    }  # fmt: skip
    block |= {f"ec.{t}.weight": [2, 6] for t in range(3)}
    block |= {f"mlp{site}.{t}.weight": [1, 5] for site in (1, 2) for t in range(3)}
    block |= {f"mlp{site}.{t}.bias": [1] for site in (1, 2) for t in range(3)}
    expected = {"embeding.weight": [12, 6]}
    expected |= {f"residual_blocks.{k}.{name}": shape for k in (0, 1) for name, shape in block.items()}
    for t, labels in enumerate([12, 5, 4]):
        expected |= {f"task_classifier.{t}.weight": [labels, 6], f"task_classifier.{t}.bias": [labels]}
    assert shapes == expected
    of_task_1 = {name for name in expected if ".mlp" not in name and not name.startswith("task_classifier")}
    of_task_1 -= {f"residual_blocks.{k}.ec.{t}.weight" for k in (0, 1) for t in (1, 2)}
    assert set(single().state_dict()) == of_task_1 | {"task_classifier.0.weight", "task_classifier.0.bias"}


def test_initial_values() -> None:
    model = ReferenceTCN(
        {**PARA, "item_size": 400, "dilated_channels": 64, "num_task": 2, "target_item_size": [400, 50]}
    )
    items = model.embeding.weight
    assert items.abs().max() <= 0.05 and items.abs().max() > 0.0499 and abs(items.mean()) < 1e-3
    e = torch.cat([embedding.weight for block in model.residual_blocks for embedding in block.ec])
    assert e.min() >= 0 and e.max() <= 2 and abs(e.mean() - 1) < 0.1
    for head in model.task_classifier:
        assert head.weight.std().item() == pytest.approx(0.01, rel=0.05) and (head.bias == torch.tensor(0.1)).all()
    relation = [p for name, p in model.named_parameters() if ".mlp" in name]
    weights = torch.cat([p.flatten() for p in relation if p.dim() == 2])
    assert weights.std().item() == pytest.approx(0.01, rel=0.4) and weights.abs().max() < 0.05
    assert all((p == torch.tensor(0.1)).all() for p in relation if p.dim() == 1)
    block = model.residual_blocks[0]
    assert (block.ln1.weight == 1).all() and (block.ln2.bias == 0).all()
    bound = 1 / math.sqrt(64 * 3)
    assert 0.99 * bound < block.conv1.weight.abs().max() <= bound


def test_one_more_task_keeps_all_but_the_relation_weights() -> None:
    model = several(2)
    larger = model.extended(4)
    assert larger.labels == [12, 5, 4] and larger.embeding.weight.dtype == torch.float64
    new = larger.state_dict()
    for name, value in model.state_dict().items():
        if ".mlp" in name:
            assert name.endswith("bias") or new[name].shape == (1, 5)
        else:
            assert torch.equal(new[name], value) and new[name].data_ptr() != value.data_ptr(), name


def test_a_network_of_task_1_grows_into_the_form_of_several_tasks() -> None:
    model = single()
    assert model.extended(5).labels == [12, 5] and set(model.state_dict()) < set(model.extended(5).state_dict())


def test_teacher_may_be_given_the_labels_of_all_tasks() -> None:
    """The published program builds the teacher from the student's dict, with num_task one less."""
    assert single(num_task=2, target_item_size=[12, 5, 4]).labels == [12, 5]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="missing dilations, target_item_size"):
        ReferenceTCN({key: value for key, value in {**PARA, "num_task": 2}.items() if key != "dilations"})
    with pytest.raises(ConfigError, match="got 1 entries, expected num_task = 2"):
        single(num_task=2, target_item_size=[12])
    with pytest.raises(ShapeError, match=r"masks \[3, 6\], expected \[B, L\] and \[4, f\]"):
        single().hidden(torch.zeros(1, 2, dtype=torch.int64), torch.ones(3, 6))
