"""Masks: Eq. 6, 12 and 13 in scalar arithmetic, and what defines each variant."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.reference import ReferenceTCN, plain_masks, relation_mask
from teracon_fast.reference.masks import num_relation_weights, relation_rows

PARA = {"item_size": 9, "dilated_channels": 6, "dilations": [1, 4], "kernel_size": 3, "task_embs": [0, 2]}


def para_of(labels: list[int]) -> dict[str, object]:
    return {**PARA, "num_task": len(labels), "target_item_size": labels}


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_plain_mask_is_equation_6() -> None:
    e = torch.tensor([[-0.4, 0.0, 1.5]], dtype=torch.float64)
    expected = [sigmoid(0.7 * value) for value in (-0.4, 0.0, 1.5)]
    assert plain_masks(e, 0.7).flatten().tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("task", [0, 1, 2])
def test_relation_mask_is_equation_12(task: int) -> None:
    """Three tasks, one channel at a time, term by term."""
    e, w, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64), torch.tensor(0.3).double()
    s, others = 1.7, [i for i in range(3) if i != task]
    mask = relation_mask(e, w, b, task, s)
    for channel in range(4):
        total = w[0] * math.tanh(s * e[task, channel]) + b
        for n, other in enumerate(others):
            total += w[1 + 2 * n] * math.tanh(s * e[other, channel])
            total += w[2 + 2 * n] * math.tanh(-s * e[other, channel])
        assert mask[channel].item() == pytest.approx(sigmoid(s * total.item()), rel=1e-13)


def test_rows_are_own_then_others_ascending_with_their_negatives() -> None:
    e = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert relation_rows(e, 2).flatten().tolist() == [3, 1, -1, 2, -2, 4, -4]
    assert relation_rows(e, 2, "positive_only").flatten().tolist() == [3, 1, 2, 4]


def test_a_pair_of_weights_acts_through_its_difference() -> None:
    """tanh is odd, so w+ tanh(x) + w- tanh(-x) = (w+ - w-) tanh(x)."""
    e, b = torch.randn(2, 8, dtype=torch.float64), torch.tensor(0.1).double()
    one = relation_mask(e, torch.tensor([0.4, 0.9, 0.2], dtype=torch.float64), b, 0, 2.0)
    other = relation_mask(e, torch.tensor([0.4, 0.5, -0.2], dtype=torch.float64), b, 0, 2.0)
    assert torch.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_positive_only_is_relation_without_the_negated_rows(num_tasks: int) -> None:
    e, b = torch.randn(num_tasks, 8, dtype=torch.float64), torch.tensor(-0.2).double()
    w = torch.randn(num_tasks, dtype=torch.float64)
    padded = torch.zeros(2 * num_tasks - 1, dtype=torch.float64)
    padded[0], padded[1::2] = w[0], w[1:]
    for task in range(num_tasks):
        assert torch.allclose(
            relation_mask(e, w, b, task, 3.0, "positive_only"), relation_mask(e, padded, b, task, 3.0), rtol=1e-12
        )


def test_none_ignores_the_other_tasks() -> None:
    e = torch.randn(3, 8)
    assert torch.equal(relation_mask(e, None, None, 1, 5.0, "none"), torch.sigmoid(5.0 * e[1]))


def test_bad_arguments_are_named() -> None:
    e = torch.randn(3, 4)
    with pytest.raises(ConfigError, match="'negative'.*relation, positive_only, none"):
        relation_mask(e, torch.randn(5), torch.tensor(0.1), 0, 1.0, "negative")
    with pytest.raises(ShapeError, match=r"got \[3\], expected \[5\]"):
        relation_mask(e, torch.randn(3), torch.tensor(0.1), 0, 1.0)
    with pytest.raises(ShapeError, match=r"got \[5\], expected \[3\]"):
        relation_mask(e, torch.randn(5), torch.tensor(0.1), 0, 1.0, "positive_only")
    with pytest.raises(ShapeError, match=r"got None, expected \[5\]"):
        relation_mask(e, None, None, 0, 1.0)


def copy_shared(source: ReferenceTCN, target: ReferenceTCN) -> None:
    """Everything but the relation weights."""
    target.load_state_dict({k: v for k, v in source.state_dict().items() if ".mlp" not in k}, strict=False)


def test_model_positive_only_equals_relation_with_zeroed_negatives() -> None:
    """The same network, whichever of the two forms holds it, for every task."""
    relation, positive = (ReferenceTCN(para_of([9, 4, 3]), v).double() for v in ("relation", "positive_only"))
    copy_shared(relation, positive)
    with torch.no_grad():
        for name, weight in relation.named_parameters():
            if ".mlp" in name and name.endswith("weight"):
                weight[:, 2::2] = 0
                positive.get_parameter(name).copy_(torch.cat([weight[:, :1], weight[:, 1::2]], dim=1))
            elif ".mlp" in name:
                positive.get_parameter(name).copy_(weight)
    x = torch.randint(9, (2, 7))
    for task in range(3):
        expected, got = (model(x, 4.0, [], task, onecall=True)[0] for model in (relation, positive))
        assert torch.allclose(got, expected, rtol=1e-11)


def test_model_none_uses_plain_masks_and_has_no_relation_weights() -> None:
    model = ReferenceTCN(para_of([9, 4]), "none")
    assert not [name for name in model.state_dict() if ".mlp" in name]
    embeddings = torch.stack([torch.cat([block.ec[t].weight for block in model.residual_blocks]) for t in range(2)], 1)
    assert torch.equal(model.all_masks(6.0), torch.sigmoid(6.0 * embeddings))


def test_all_masks_are_the_masks_of_each_task() -> None:
    model = ReferenceTCN(para_of([9, 4, 3]))
    masks = model.all_masks(3.0)
    assert masks.shape == (4, 3, 6)
    for task in range(3):
        used: list[Tensor] = []
        model(torch.zeros(1, 2, dtype=torch.int64), 3.0, used, task)
        assert torch.equal(masks[:, task], torch.cat(used))


def test_one_task_alone_has_plain_masks() -> None:
    """Both forms of a network of one task; the form with num_task does hold relation weights, of one row."""
    single, several = ReferenceTCN(PARA), ReferenceTCN(para_of([9]))
    copy_shared(single, several)
    assert not single.has_relation and several.has_relation
    assert several.residual_blocks[0].mlp1[0].weight.shape == (1, 1)
    assert torch.equal(single.all_masks(8.0), several.all_masks(8.0))


@pytest.mark.parametrize(("variant", "rows"), [("relation", 7), ("positive_only", 4), ("none", 0)])
def test_number_of_relation_weights(variant: str, rows: int) -> None:
    assert num_relation_weights(4, variant) == rows
