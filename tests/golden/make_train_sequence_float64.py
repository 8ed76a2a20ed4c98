"""Make train_sequence_float64.npz: the task sequence of train_sequence.npz, run in float64 by the authors' program.

    python tests/golden/make_train_sequence_float64.py FOLDER_OF_THE_AUTHORS_PROGRAM

In fp32 the last digits of tasks 3 and 4 depend on the processor (see README.md here); in float64 they do not, so this is
the vector that shows whether a training loop is the same one. The batches, the drawn users and the initial values are
those of train_sequence.npz; here each task starts from the weights that the run itself reached.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent


def main(program: str) -> None:
    sys.path.insert(0, program)
    single, several = (importlib.import_module(name).NextItNet_Decoder for name in ("generator_hat_other", "teracon"))
    ratio_of = importlib.import_module("utils").sample_ratio
    # That program asks every index tensor for its device number, which a tensor on the CPU does not have.
    torch.Tensor.get_device = lambda self: "cpu"  # type: ignore[assignment, method-assign, return-value]

    given = np.load(HERE / "train_sequence.npz")
    meta = json.loads(str(given["meta"]))
    sizes = {"item_size": meta["items"], "dilated_channels": meta["f"], "dilations": meta["dilations"]}
    sizes |= {"kernel_size": 3, "task_embs": [0, 2]}
    scales = [(50 - 1 / 50) * b / meta["steps"] + 1 / 50 for b in range(meta["steps"])]
    result: dict[str, Any] = {"meta": json.dumps(meta)}

    def initial(task: int) -> dict[str, torch.Tensor]:
        head = f"t{task}.init."
        return {
            name.removeprefix(head): torch.from_numpy(given[name]).double() for name in given if name.startswith(head)
        }

    def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for name, parameter in model.named_parameters():
            if ".ec" in name:
                parameter.data.clamp_(-6, 6)

    def keep(task: int, model: torch.nn.Module) -> None:
        result.update({f"t{task}.final.{name}": value.numpy() for name, value in model.state_dict().items()})

    model = single(sizes).double()
    model.load_state_dict(initial(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=meta["lr"])
    for b, s in enumerate(scales):
        x = torch.from_numpy(given[f"t1.x.{b}"])
        loss = F.cross_entropy(model(x[:, :-1], s, [], 0, "cpu")[0], x[:, 1:].flatten())
        update(model, optimizer, loss)
        result[f"t1.loss.{b}"] = loss.item()
    keep(1, model)

    for task in range(2, len(meta["targets"]) + 2):
        sizes["target_item_size"] = [meta["items"], *meta["targets"][: task - 1]]
        reached = model.state_dict()
        teacher, model = (several(sizes | {"num_task": n}).double() for n in (task - 1, task))
        teacher.load_state_dict(reached, strict=False)
        model.load_state_dict(initial(task) | {name: reached[name] for name in reached if ".mlp" not in name})
        optimizer, ratios, new = torch.optim.Adam(model.parameters(), lr=meta["lr"]), [0.9] * (task - 1), task - 1
        for b, s in enumerate(scales):
            x, y = torch.from_numpy(given[f"t{task}.x.{b}"]), torch.from_numpy(given[f"t{task}.y.{b}"])
            drawn = [x[torch.from_numpy(given[f"t{task}.users.{b}.{j}"])] for j in range(new)]
            drawn[0] = drawn[0][:, :-1]
            with torch.no_grad():
                taught = [teacher(rows, s, [], j, "cpu", True, new_task=new) for j, rows in enumerate(drawn)]
            logits, masks = model(x, s, [], new, "cpu", True, new_task=new)
            learned = [model(rows, s, [], j, "cpu", True, True, new)[0] for j, rows in enumerate(drawn)]
            class_loss = F.cross_entropy(logits, y)
            errors = [F.mse_loss(mine, other) for mine, (other, _) in zip(learned, taught, strict=True)]
            retention = torch.stack([r / sum(ratios) * e for r, e in zip(ratios, errors, strict=True)]).sum()
            update(model, optimizer, class_loss + meta["alpha"] * retention)
            ratios = [ratio_of(past, masks) for _, past in taught]
            result[f"t{task}.class_loss.{b}"] = class_loss.item()
            result[f"t{task}.retention_loss.{b}"] = retention.item()
            result[f"t{task}.next_ratio.{b}"] = np.array(ratios)
        keep(task, model)
    np.savez_compressed(HERE / "train_sequence_float64.npz", **result)


if __name__ == "__main__":
    main(sys.argv[1])
