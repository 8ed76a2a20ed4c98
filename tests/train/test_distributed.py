"""DistributedDataParallel around a step's loss, as docs/gpu.md has it: two processes with half of a batch each."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from teracon_fast import FastTCN, Request


class Loss(torch.nn.Module):
    def __init__(self, model: FastTCN) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor, s: float) -> Tensor:
        (hidden,) = self.model.encode(x, [Request(task=1)], s)
        return self.model.class_loss(hidden, 1, y, predictions=False).loss


def network() -> FastTCN:
    torch.manual_seed(0)
    return FastTCN(num_items=20, channels=8, labels=[20, 5], dilations=(1, 2))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(1, 20, (8, 7), generator=generator)
    x[::3, :4] = 0
    return x, torch.randint(0, 5, (8,), generator=generator)


def half_of_a_batch(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, (x, y), part = network(), batch(), slice(4 * rank, 4 * rank + 4)
    loss = DistributedDataParallel(Loss(model), find_unused_parameters=True)
    loss(x[part], y[part], 3.0).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gradients_of_two_processes_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    multiprocessing.start_processes(half_of_a_batch, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    model, (x, y) = network(), batch()
    Loss(model)(x, y, 3.0).backward()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    used = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(used) > 20 and "task_classifier.0.weight" not in used
    for name, gradient in used.items():
        assert torch.equal(found[0][name], found[1][name]), name
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_the_page_has_this_module() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    own = Path(__file__).read_text().split("class Loss")[1].split("\n\n\ndef ")[0]
    assert own in page
