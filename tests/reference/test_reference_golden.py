"""The reference against the numbers of the published program. What each bound rests on: tests/golden/README.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from golden_vectors import T1_NAMES, TCN_NAMES, Golden, gradient_errors, gradients, load, relative_error
from torch import Tensor

from teracon_fast.reference import ReferenceTCN, annealed_scale, continual_step, cross_entropy, t1_step
from teracon_fast.reference.step import FIRST_RHO, frozen_copy

Load = Callable[[str], Golden]


def model_of(vector: Golden) -> ReferenceTCN:
    model = ReferenceTCN(vector.meta["model_para"])
    model.load_state_dict(vector.under("param."))
    return model


def assert_same_masks(masks: list[Tensor], vector: Golden) -> None:
    expected = vector.under("mask.")
    assert len(masks) == len(expected)
    for site, mask in enumerate(masks):
        assert relative_error(mask, expected[str(site)].unsqueeze(0)) < 1e-6, site


def assert_same_gradients(model: ReferenceTCN, vector: Golden) -> None:
    errors = gradient_errors(gradients(model), vector.under("grad."))
    assert max(errors.values()) < 1e-5, errors


def test_all_vectors_are_there() -> None:
    assert len(T1_NAMES) == 2 and len(TCN_NAMES) == 12


@pytest.mark.parametrize("name", T1_NAMES)
def test_network_of_task_1(golden: Load, name: str) -> None:
    vector = golden(name)
    model, masks = model_of(vector), []
    logits, _ = model(vector["x"][:, :-1], vector.meta["s"], masks, 0, None)
    loss = cross_entropy(logits, vector["x"][:, 1:].flatten())
    loss.backward()
    assert relative_error(logits, vector["out"]) < 1e-6
    assert relative_error(loss, vector["loss"]) < 1e-6
    assert_same_masks(masks, vector)
    assert_same_gradients(model, vector)


@pytest.mark.parametrize("name", TCN_NAMES)
def test_network_of_several_tasks(golden: Load, name: str) -> None:
    vector = golden(name)
    model, masks = model_of(vector), []
    logits, _ = model(vector["x"], vector.meta["s"], masks, gpu_num=None, **vector.call())
    (logits * vector["grad_out"]).sum().backward()
    assert relative_error(logits, vector["out"]) < 1e-6
    assert_same_masks(masks, vector)
    assert_same_gradients(model, vector)


def train_sequence(given: Golden, dtype: torch.dtype, restart: bool) -> dict[str, Tensor]:
    """Train tasks 1 to 4 on the batches and drawn users of `given`; results under the names of the golden files.

    restart: every task and its teacher start from the weights in `given` instead of those that this run reached.
    """
    meta, result = given.meta, {}
    para = {"item_size": meta["items"], "dilated_channels": meta["f"], "dilations": meta["dilations"]}
    model = ReferenceTCN({**para, "kernel_size": 3, "task_embs": [0, 2]}).to(dtype)
    scales = [annealed_scale(b, meta["steps"], meta["smax"]) for b in range(meta["steps"])]
    for task in range(1, len(meta["targets"]) + 2):
        teacher = frozen_copy(model)
        if task > 1:
            if restart:
                teacher.load_state_dict(given.under(f"t{task - 1}.final."))
            model = teacher.extended(meta["targets"][task - 2])
        reached = {} if restart else {k: v for k, v in teacher.state_dict().items() if task > 1 and ".mlp" not in k}
        model.load_state_dict({**given.under(f"t{task}.init."), **reached})
        optimizer, rho = torch.optim.Adam(model.parameters(), lr=meta["lr"]), [FIRST_RHO] * (task - 1)
        for b, s in enumerate(scales):
            x = given[f"t{task}.x.{b}"]
            if task == 1:
                result[f"t1.loss.{b}"] = torch.tensor(t1_step(model, optimizer, x, s), dtype=torch.float64)
                continue
            users = [given[f"t{task}.users.{b}.{j}"] for j in range(task - 1)]
            y = given[f"t{task}.y.{b}"]
            step = continual_step(model, teacher, optimizer, x, y, users, rho, s, meta["alpha"])
            rho = step.next_rho
            for name in ("class_loss", "retention_loss"):
                result[f"t{task}.{name}.{b}"] = torch.tensor(getattr(step, name), dtype=torch.float64)
            result[f"t{task}.next_ratio.{b}"] = torch.tensor(rho, dtype=torch.float64)
        result.update({f"t{task}.final.{name}": value.clone() for name, value in model.state_dict().items()})
    return result


def test_training_sequence_in_float64_is_the_published_one(golden: Load) -> None:
    """Four tasks in one run: the only error is rounding, so every number of the run agrees to 1e-9."""
    expected = golden("train_sequence_float64")
    result = train_sequence(golden("train_sequence"), torch.float64, restart=False)
    assert set(result) == set(expected.arrays)
    errors = {name: relative_error(value, expected[name]) for name, value in result.items()}
    assert max(errors.values()) < 1e-9, max(errors.items(), key=lambda item: item[1])


@pytest.fixture(scope="module")
def fp32_errors() -> dict[str, float]:
    """Relative error of every number of train_sequence.npz, in the dtype in which it was made."""
    expected = load("train_sequence")
    result = train_sequence(expected, torch.float32, restart=True)
    return {name: relative_error(value, expected[name]) for name, value in result.items()}


# Below the line: what fp32 arithmetic does not determine better, on the published program's own evidence (README there).
@pytest.mark.parametrize(
    ("prefix", "bound"),
    [
        ("t1.loss.", 1e-6),
        ("t2.class_loss.", 1e-6),
        ("t3.class_loss.", 1e-5),
        ("t4.class_loss.", 1e-5),
        ("t2.next_ratio.", 1e-5),
        ("t3.next_ratio.", 1e-5),
        ("t4.next_ratio.", 1e-5),
        ("t1.final.", 1e-5),
        ("t2.final.", 1e-5),
        # ----
        ("t2.retention_loss.", 1e-4),
        ("t3.retention_loss.", 5e-2),
        ("t4.retention_loss.", 5e-2),
        ("t3.final.", 5e-2),
        ("t4.final.", 5e-2),
    ],
)
def test_training_sequence_in_fp32(fp32_errors: dict[str, float], prefix: str, bound: float) -> None:
    chosen = {name: error for name, error in fp32_errors.items() if name.startswith(prefix)}
    assert len(chosen) >= 4 and max(chosen.values()) < bound, max(chosen.items(), key=lambda item: item[1])
