"""FastTCN: NextItNet's dilated causal network under TERACON's task masks, evaluated on packed rows.

A drop-in for the published `NextItNet_Decoder` (same constructor dict, call, in-place masks list and state-dict names),
and a native interface that encodes several (users, task) requests in one pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from teracon_fast import ops, packing
from teracon_fast.errors import ConfigError
from teracon_fast.model.backbone import (
    ENCODER_USERS,
    Backbone,
    PackedPositions,
    head_loss,
    init_linear,
    next_item_inputs,
)
from teracon_fast.model.encoder import Encoder
from teracon_fast.ops import backends
from teracon_fast.ops.task_masks import MaskVariant, check_variant, of_tasks, relation_width


@dataclass(frozen=True)
class Request:
    """Which users to encode under which task's mask.

    Attributes:
        task: counted from 0.
        users: int64 `[n]`, rows of x; None for all of them, in order.
        drop_last: items dropped from the end of each sequence first (1: the state at position L-2).
    """

    task: int
    users: Tensor | None = None
    drop_last: int = 0


class Encode(Protocol):
    """What `FastTCN.encoder` returns."""

    def __call__(self, x: Tensor, task: int, drop_last: int = 0, lengths: np.ndarray | None = None) -> Tensor: ...


def _with_rows(old: Tensor, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([old.detach(), rows.to(old)]), requires_grad=old.requires_grad)


class FastTCN(Backbone):
    """TERACON's user encoder with one head per task.

    Two constructors. `FastTCN(model_para)` takes the published dict: item_size, dilated_channels, dilations, kernel_size,
    task_embs, and for the network of several tasks num_task and target_item_size (without num_task: the task-1 network,
    plain mask, head over all items). The native one takes named arguments:

    Args:
        num_items: V, rows of the item embedding including the pad, item 0 (a learned row like any other).
        channels: f.
        labels: number of labels of each task; None means one next-item task over all items.
        dilations: one per residual block; its convolutions have dilations d and 2d.
        kernel_size: at least 2.
        task_embedding_range: bounds of the uniform initialization of task embeddings.
        mask: "relation" (Eq. 12), "positive_only" (no negated rows) or "none" (Eq. 6).
        backend: of the compiled operations, see `teracon_fast.env_report()`. An operation that has no implementation of that
            name (task masks of `cpu`) runs on "torch".
        algorithm: of the convolutions, "auto", "direct" or "winograd", see `ops.masked_conv`.

    With one task the native form has no relation weights and uses the plain mask (Eq. 6), like the published task-1 network.

    Attributes: those of `Backbone`.

    Raises:
        ConfigError: for a missing or invalid argument.
    """

    def __init__(
        self,
        model_para: Mapping[str, Any] | None = None,
        *,
        num_items: int | None = None,
        channels: int = 256,
        labels: Sequence[int] | None = None,
        dilations: Sequence[int] = (1, 4, 1, 4, 1, 4, 1, 4),
        kernel_size: int = 3,
        task_embedding_range: Sequence[float] = (0.0, 2.0),
        mask: str = "relation",
        backend: str = "auto",
        algorithm: str = "auto",
    ) -> None:
        variant = check_variant(mask)
        if model_para is not None:
            if num_items is not None or labels is not None:
                raise ConfigError("FastTCN takes either the published dict or named arguments, got both")
            num_items, channels, labels, dilations, kernel_size, task_embedding_range, published_t1 = _read_para(model_para)
            has_relation = not published_t1 and variant != "none"
        elif num_items is None:
            raise ConfigError("FastTCN needs num_items (or the published dict as its first argument)")
        else:
            labels = [num_items] if labels is None else list(labels)
            has_relation = len(labels) > 1 and variant != "none"
        low, high = task_embedding_range
        width = relation_width(len(labels), variant) if has_relation else None
        super().__init__(
            num_items, channels, dilations, kernel_size, backend, algorithm, len(labels), width, (float(low), float(high))
        )
        if not labels or any(count < 1 for count in labels):
            raise ConfigError(f"labels are {list(labels)}, expected one positive count per task")
        self.model_para = dict(model_para) if model_para is not None else None
        self.labels = [int(count) for count in labels]
        self.task_embedding_range = (float(low), float(high))
        self.mask_variant: MaskVariant = variant
        self.task_classifier = nn.ModuleList(nn.Linear(self.channels, count) for count in self.labels)
        for task in range(self.num_tasks):
            init_linear(self.head(task))

    @property
    def num_tasks(self) -> int:
        """T, number of tasks the network has heads and masks for."""
        return len(self.labels)

    @property
    def has_relation(self) -> bool:
        """Whether masks are relation-aware (Eq. 12) or plain (Eq. 6)."""
        return hasattr(self.blocks[0], "mlp1")

    def head(self, task: int) -> nn.Linear:
        """The head of a task, counted from 0: `Linear(f, labels[task])`."""
        self._check_task(task)
        return cast(nn.Linear, self.task_classifier[task])

    def masks(self, s: float | Tensor, tasks: Sequence[int] | None = None, plain: bool = False) -> Tensor:
        """Masks of the given tasks (None: all) at every site, `[S, n, f]`, in network order.

        Args:
            s: mask scale.
            tasks: counted from 0.
            plain: use `sigmoid(s * e)` even where relation weights exist.
        """
        chosen = tuple(range(self.num_tasks)) if tasks is None else tuple(tasks)
        for task in chosen:
            self._check_task(task)
        embeddings, weights, biases, variant = self._mask_parameters(chosen, plain)
        # Plain masks: the embeddings are those of the chosen tasks alone.
        numbers = None if weights is None else chosen
        return ops.task_masks(
            embeddings, weights, biases, s, variant=variant, tasks=numbers, backend=self._backend_of("task_masks")
        )

    def step_masks(self, teacher: FastTCN, s: float | Tensor, c: float = 6.0) -> ops.StepMasks:
        """Masks of all tasks and the teacher's at every site, and the sampling rates that follow from them (Eq. 12, 15).

        Args:
            teacher: of the past tasks; without gradient.
            s: mask scale of both.
            c: scale of the cosine between the teacher's masks and that of the last task.

        Returns:
            `masks(s)` `[S, T, f]`; the teacher's `masks(s)` `[S, J, f]`; rho, float64 `[J]`, for the next step.
        """
        own = self._mask_parameters(tuple(range(self.num_tasks)))
        with torch.no_grad():
            its = teacher._mask_parameters(tuple(range(teacher.num_tasks)))
        return ops.step_masks(own, its, s, c, backend=self._backend_of("task_masks"))

    def _mask_parameters(self, chosen: tuple[int, ...], plain: bool = False) -> ops.MaskParameters:
        """Parameters of the chosen tasks' masks; for plain masks only the chosen tasks' embeddings."""
        plain = plain or not self.has_relation
        # A parameter that the chosen masks do not depend on stays out of the graph: its gradient is None, as published.
        used = chosen if plain else tuple(range(self.num_tasks))
        sites = self.num_sites
        embeddings = torch.stack([block.task_embeddings[t] for block in self.blocks for t in used])
        embeddings = embeddings.view(sites // 2, len(used), 2, -1).transpose(1, 2).reshape(sites, len(used), -1)
        if plain:
            return ops.MaskParameters(embeddings, variant=self.mask_variant)
        linears = [block.relation_weights(t)[site] for block in self.blocks for site in (0, 1) for t in chosen]
        weights = torch.cat([linear.weight for linear in linears]).view(sites, len(chosen), -1)
        biases = torch.cat([linear.bias for linear in linears]).view(sites, len(chosen))
        return ops.MaskParameters(embeddings, weights, biases, self.mask_variant)

    def _backend_of(self, operation: str) -> str:
        return backends.of_model(self.backend, operation)

    def encode(
        self, x: Tensor, requests: Sequence[Request], s: float = 50.0, masks: Tensor | None = None,
        lengths: np.ndarray | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """User representations for several (users, task) requests in one packed pass (Eq. 8).

        Args:
            x: int64 `[B, L]` item ids, oldest first, left-padded with 0.
            requests: what to encode; each gives one result.
            s: mask scale, used when `masks` is None.
            masks: `[S, T, f]` from `self.masks(s)`, to share them with other uses.
            lengths: real lengths int64 `[B]` on the host, if known; else computed from x.

        Returns:
            One `[n, f]` tensor per request, states of the last position, in the request's order of users.
        """
        for request in requests:
            self._check_task(request.task)
        chosen = of_tasks(self.masks(s) if masks is None else masks, [request.task for request in requests])
        return self._last_states(x, [(r.users, r.drop_last) for r in requests], chosen, lengths)

    def encoder(self, s: float = 50.0) -> Encode:  # type: ignore[override]  # takes a task with each call
        """`encode(x, task, drop_last, lengths)` for many calls without gradient: what does not depend on x is computed once.

        Arguments and result as `Encoder.encode`. Valid while the model's parameters keep their values.
        """
        with torch.no_grad():
            masks = self.masks(s)
            if Encoder.serves(self):
                return Encoder(self, masks).encode

        @torch.no_grad()
        def encode(x: Tensor, task: int, drop_last: int = 0, lengths: np.ndarray | None = None) -> Tensor:
            return self.encode(x, [Request(task, None, drop_last)], s, masks, lengths)[0]

        return encode

    def _last_states(
        self, x: Tensor, requests: Sequence[tuple[Tensor | None, int]], chosen: Tensor, lengths: np.ndarray | None
    ) -> list[Tensor]:
        """States of the last position for each (users, drop_last); `chosen` is `[S, requests, f]`."""
        users = sum(x.shape[0] if rows is None else rows.shape[0] for rows, _ in requests)
        low = torch.is_autocast_enabled("cpu")
        low_is_bf16 = torch.get_autocast_dtype("cpu") == torch.bfloat16
        if torch.is_grad_enabled() or users < ENCODER_USERS or not Encoder.serves(self) or (low and not low_is_bf16):
            hidden, packed = self.run(x, requests, chosen, lengths)
            return [ops.gather_rows(hidden, rows) for rows in packed.outputs]
        encoder = Encoder(self, chosen, "bf16" if low else "fp32")
        found, x = [], x.cpu()
        lengths = packing.real_lengths(x) if lengths is None else lengths
        for i, (rows, drop) in enumerate(requests):
            part = slice(None) if rows is None else rows.detach().cpu()
            state = encoder.encode(x[part], i, drop, lengths[part if rows is None else np.asarray(part)])
            found.append(state.to(torch.bfloat16) if low else state)
        return found

    def encode_all(
        self, x: Tensor, task: int = 0, s: float = 50.0, masks: Tensor | None = None, lengths: np.ndarray | None = None
    ) -> PackedPositions:
        """States of every position under one task's mask, equal pad states merged. Arguments as `encode`."""
        self._check_task(task)
        masks = self.masks(s) if masks is None else masks
        return self.positions(x, of_tasks(masks, [task]), lengths)

    def next_item_loss(
        self, x: Tensor, s: float = 50.0, masks: Tensor | None = None, lengths: np.ndarray | None = None
    ) -> Tensor:
        """Task 1's loss: item p+1 from positions <= p, mean cross-entropy over all B*(L-1) positions, pad targets counted.

        Args:
            x: int64 `[B, L]`, L at least 2; inputs are `x[:, :-1]`, targets `x[:, 1:]`.
            s, masks, lengths: as `encode`.
        """
        return self.next_item(x, s, masks, lengths, predictions=False).loss

    def next_item(
        self, x: Tensor, s: float = 50.0, masks: Tensor | None = None, lengths: np.ndarray | None = None,
        predictions: bool = True,
    ) -> ops.CrossEntropy:  # fmt: skip
        """`next_item_loss`, each target's rank `[B*(L-1)]`, the argmax of distinct states: both empty without `predictions`."""
        seen, real = next_item_inputs(x, lengths)
        return self.next_item_of(self.encode_all(seen, 0, s, masks, real), x, predictions)

    def next_item_of(self, positions: PackedPositions, x: Tensor, predictions: bool = True) -> ops.CrossEntropy:
        """`next_item` of sequences `[B, L]` whose states, without the last item, are known."""
        return self.class_loss(positions.hidden, 0, x[:, 1:].reshape(-1), predictions, positions.row_of.reshape(-1))

    def class_loss(
        self, hidden: Tensor, task: int, targets: Tensor, predictions: bool = True, rows: Tensor | None = None
    ) -> ops.CrossEntropy:
        """Mean cross-entropy of a task's head over states `[n, f]` (Eq. 18). Other arguments as `head_loss`."""
        return head_loss(self.head(task), hidden, targets, rows, predictions, self.backend)

    def forward(
        self, x: Tensor, s: float | Tensor, masks_list: list[Tensor] | None, task_num: int, gpu_num: Any = None,
        onecall: bool = False, backward: bool = False, new_task: int = 2,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """The published call. `gpu_num` is ignored: the model runs where its parameters are.

        Args:
            x: int64 `[B, L]`.
            s: mask scale.
            masks_list: extended in place with the S masks, each `[1, f]`, in network order, and returned.
            task_num: task counted from 0.
            onecall: logits of the last position only.
            backward, new_task: the plain mask is used only if `task_num != new_task and new_task == 1 and not backward`.

        Returns:
            logits `[B, C]` with onecall, else `[B*L, C]`; and `masks_list`.
        """
        self._check_task(task_num)
        plain = task_num != new_task and new_task == 1 and not backward
        chosen = self.masks(s, [task_num], plain)
        masks_list = [] if masks_list is None else masks_list
        masks_list += list(chosen)
        head = self.head(task_num)
        if onecall:
            return head(self._last_states(x, [(None, 0)], chosen, None)[0]), masks_list
        found = self.positions(x, chosen)
        hidden, rows = found.hidden, found.row_of.reshape(-1)
        if rows.shape[0] < hidden.shape[0]:
            return head(ops.gather_rows(hidden, rows)), masks_list
        # Equal pad states meet the head once.
        return ops.gather_rows(head(hidden), rows), masks_list

    def extended(self, num_labels: int, generator: torch.Generator | None = None) -> FastTCN:
        """A new model with one more task, ready to train it.

        Backbone, item and task embeddings and heads are copied. The new task's embedding and head are initialized, as are the
        relation weights of all tasks, since their number changes.

        Args:
            num_labels: labels of the new task.
            generator: CPU generator that seeds the new parameters; None draws from torch's global one.
        """
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(self)(
                num_items=self.num_items, channels=self.channels, labels=[*self.labels, num_labels],
                dilations=self.dilations, kernel_size=self.kernel_size,
                task_embedding_range=self.task_embedding_range, mask=self.mask_variant, backend=self.backend,
                algorithm=self.algorithm,
            )  # fmt: skip
        kept = {name: value for name, value in self.state_dict().items() if ".mlp" not in name}
        parameter = self.embeding.stored
        model.to(device=parameter.device, dtype=parameter.dtype)  # before the values, which float32 would round
        model.load_state_dict(kept, strict=False)
        return model

    def grown(
        self, num_items: int, labels: Sequence[int] | None = None, generator: torch.Generator | None = None
    ) -> FastTCN:
        """A new model with more items, and more labels in the heads of its tasks; old ids keep their meaning.

        New rows are initialized as those of a new model: items U(-sqrt(1/V), sqrt(1/V)) with V = num_items, labels N(0, 0.01)
        with bias 0.1. All else is copied.

        Args:
            num_items: V of the new model.
            labels: labels of each task; None: a task-1 head over all items grows with them, the others stay.
            generator: CPU generator that seeds the new rows; None draws from torch's global one. Models of one sequence of
                tasks get the same rows from the same seed, whatever the number of tasks.

        Raises:
            ConfigError: fewer items or labels than there are, or a task-1 head that would no longer cover the items.
        """
        covers = self.labels[0] == self.num_items
        labels = [num_items if covers else self.labels[0], *self.labels[1:]] if labels is None else list(labels)
        if num_items < self.num_items:
            raise ConfigError(f"num_items is {num_items}, expected at least the {self.num_items} that there are")
        if len(labels) != self.num_tasks or any(new < old for new, old in zip(labels, self.labels, strict=True)):
            raise ConfigError(f"labels are {labels}, expected one count a task, at least {self.labels}")
        if covers and labels[0] != num_items:
            raise ConfigError(f"labels of task 1 are {labels[0]}, expected {num_items}: its head covers the items")
        model = copy.deepcopy(self)
        bound = math.sqrt(1.0 / num_items)
        rows = torch.empty(num_items - self.num_items, self.channels).uniform_(-bound, bound, generator=generator)
        model.embeding.register_parameter("weight", _with_rows(self.embeding.weight, rows))
        for task, count in enumerate(labels):
            head, added = model.head(task), count - self.labels[task]
            rows = torch.empty(added, self.channels).normal_(0.0, 0.01, generator=generator)
            head.weight = _with_rows(head.weight, rows)
            head.bias = _with_rows(head.bias, torch.full((added,), 0.1))
            head.out_features = count
        model.embeding.num_embeddings = model.num_items = num_items
        model.labels = labels
        if model.model_para is not None:
            model.model_para["item_size"] = num_items
            if "num_task" in model.model_para:
                sizes = list(model.model_para["target_item_size"])
                model.model_para["target_item_size"] = [*labels, *sizes[len(labels) :]]
        return model

    def frozen(self) -> FastTCN:
        """A copy without gradients in eval mode: the teacher of the next task."""
        return copy.deepcopy(self).requires_grad_(False).eval()

    @torch.no_grad()
    def clamp_task_embeddings(self, bound: float = 6.0) -> None:
        """Clamp all task embeddings to [-bound, bound], as after every optimizer step."""
        embeddings = [embedding for block in self.blocks for embedding in block.task_embeddings]
        torch._foreach_clamp_min_(embeddings, -bound)
        torch._foreach_clamp_max_(embeddings, bound)

    def _check_task(self, task: int) -> None:
        if not 0 <= task < self.num_tasks:
            raise ConfigError(f"task is {task}, expected 0..{self.num_tasks - 1} (tasks are counted from 0)")


def _read_para(para: Mapping[str, Any]) -> tuple[int, int, list[int], Sequence[int], int, Sequence[float], bool]:
    """(num_items, channels, labels, dilations, kernel_size, task_embs, task-1 form) of the published dict."""
    required = ("item_size", "dilated_channels", "dilations", "kernel_size", "task_embs")
    missing = [key for key in required if key not in para]
    if missing:
        raise ConfigError(f"model_para lacks {missing}, expected the keys {list(required)}")
    if "num_task" in para:
        if "target_item_size" not in para or len(para["target_item_size"]) < para["num_task"]:
            got = para.get("target_item_size")
            raise ConfigError(f"target_item_size is {got}, expected one size for each of {para['num_task']} tasks")
        labels = list(para["target_item_size"])[: para["num_task"]]
    else:
        labels = [para["item_size"]]
    return (
        para["item_size"], para["dilated_channels"], labels, para["dilations"], para["kernel_size"], para["task_embs"],
        "num_task" not in para,
    )  # fmt: skip
