"""Masks of tasks in Triton: all sites, tasks, the teacher's masks and sampling rates in one launch, all gradients in another.

Forward, a program owns one mask at all sites. The program of a past task computes the teacher's mask and again the current one,
so that the sampling rate needs no other program. Backward, a program owns a site with all sums over its tasks and channels.

tanh is odd, so a task's row and its negated row act through the difference of their weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from teracon_fast.kernels.configs import Config
from teracon_fast.kernels.tiles import launch

# There are no products of tiles. A program holds tiles of rows * columns numbers: sites or tasks, and channels.
_TILES = Config(rows=16, columns=256, depth=16, warps=8, stages=1)
# (tanh(x) / x - 1) / x^2 in powers of x^2, for |x| < 1: least squares, weighted until errors are equal, 5.3e-9 of tanh.
_TANH = (
    -0.3333329889870614, 0.13332411441632822, -0.05388410642142309, 0.02149940902615926, -0.007965224562651666,
    0.0023154735749291873, -0.00036252513996273215,
)  # fmt: skip
T0, T1, T2, T3, T4, T5, T6 = (tl.constexpr(coefficient) for coefficient in _TANH)


class Parameters(NamedTuple):
    """`[S, T, f]`; of the n chosen tasks `[S, n, 2T-1]` (not negated: `[S, n, T]`) and `[S, n]`, None for plain masks."""

    embeddings: Tensor
    weights: Tensor | None
    biases: Tensor | None
    negated: bool


@triton.jit
def sigmoid(x):
    power = tl.exp(-tl.abs(x))  # never overflows, and small values keep their digits
    return tl.where(x < 0, power, 1.0) / (1.0 + power)


@triton.jit
def tanh(x):
    """Within a few units in the last place, also near 0."""
    square = x * x
    series = T0 + square * (T1 + square * (T2 + square * (T3 + square * (T4 + square * (T5 + square * T6)))))
    power = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * power / (1.0 + power)
    return tl.where(tl.abs(x) < 1.0, x + x * (square * series), tl.where(x < 0, -far, far))


@triton.jit
def scale_of(scale, HELD: tl.constexpr):
    """The scale: a number, or HELD in memory."""
    s = scale
    if HELD:
        s = tl.load(scale).to(tl.float32)
    return s


@triton.jit
def task_of(tasks, position, LISTED: tl.constexpr):
    """The chosen task of a position: from a list in memory, or counted up from the first."""
    return tl.load(tasks + position) if LISTED else tasks + position


@triton.jit
def column_of(task, other, NEGATED: tl.constexpr):
    """Column of the task's weights that holds another task: its own row is first, each negated row follows its row."""
    rank = tl.where(other < task, other + 1, other)
    return tl.where(other == task, 0, 2 * rank - 1 if NEGATED else rank)


@triton.jit
def mask_tile(
    embeddings, weights, biases, task, position, o_sites, m_sites, o_features, m_features, num_tasks, chosen, channels, s,
    RELATION: tl.constexpr, NEGATED: tl.constexpr,
):  # fmt: skip
    """Masks of one task at several sites."""
    o_rows = o_sites.to(tl.int64) * num_tasks
    m = m_sites[:, None] & m_features[None, :]
    if RELATION:
        o_masks = o_sites.to(tl.int64) * chosen + position
        p_weights = weights + o_masks * (2 * num_tasks - 1 if NEGATED else num_tasks)
        p_values = embeddings + (o_rows * channels)[:, None] + o_features[None, :]
        logit = tl.load(biases + o_masks, mask=m_sites, other=0.0)[:, None] + tl.zeros(m.shape, tl.float32)
        for other in range(num_tasks):
            column = column_of(task, other, NEGATED)
            weight = tl.load(p_weights + column, mask=m_sites, other=0.0)
            if NEGATED:
                weight -= tl.load(p_weights + column + 1, mask=m_sites & (task != other), other=0.0)
            logit += weight[:, None] * tanh(s * tl.load(p_values, mask=m, other=0.0))
            p_values += channels
    else:
        p_values = embeddings + ((o_rows + task) * channels)[:, None] + o_features[None, :]
        logit = tl.load(p_values, mask=m, other=0.0)
    return sigmoid(s * logit)


@triton.jit
def direction(mask, m, eps):
    """Masks as vectors of length 1; channels under a false mask do not count."""
    mask = tl.where(m, mask, 0.0)
    return mask / tl.maximum(tl.sqrt_rn(tl.sum(mask * mask, 1)), eps)[:, None]


@triton.jit(do_not_specialize=["tasks", "num_tasks", "chosen", "teacher_tasks", "current"])
def task_masks_kernel(
    embeddings, weights, biases, masks, teacher_embeddings, teacher_weights, teacher_biases, teacher_masks, rho,
    scale, tasks, sites, num_tasks, chosen, teacher_tasks, current, channels, c, eps,
    HELD: tl.constexpr, LISTED: tl.constexpr, RELATION: tl.constexpr, NEGATED: tl.constexpr, TEACHER_RELATION: tl.constexpr,
    TEACHER_NEGATED: tl.constexpr, SITES: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """A chosen mask at all sites; programs after those: a teacher's mask at all sites, and its sampling rate."""
    program = tl.program_id(0)
    s = scale_of(scale, HELD)
    o_features = tl.arange(0, FEATURES)
    m_features = o_features < channels
    if program < chosen:
        task = task_of(tasks, program, LISTED)
        for done in range(0, sites, SITES):
            o_sites = done + tl.arange(0, SITES)
            m_sites = o_sites < sites
            mask = mask_tile(
                embeddings, weights, biases, task, program, o_sites, m_sites, o_features, m_features, num_tasks, chosen,
                channels, s, RELATION, NEGATED,
            )  # fmt: skip
            p_masks = masks + ((o_sites.to(tl.int64) * chosen + program) * channels)[:, None] + o_features[None, :]
            tl.store(p_masks, mask, mask=m_sites[:, None] & m_features[None, :])
    else:
        past = program - chosen
        total = tl.full([], 0.0, tl.float64)
        for done in range(0, sites, SITES):
            o_sites = done + tl.arange(0, SITES)
            m_sites = o_sites < sites
            m = m_sites[:, None] & m_features[None, :]
            mask = mask_tile(
                teacher_embeddings, teacher_weights, teacher_biases, past, past, o_sites, m_sites, o_features, m_features,
                teacher_tasks, teacher_tasks, channels, s, TEACHER_RELATION, TEACHER_NEGATED,
            )  # fmt: skip
            p_masks = teacher_masks + ((o_sites.to(tl.int64) * teacher_tasks + past) * channels)[:, None] + o_features[None, :]
            tl.store(p_masks, mask, mask=m)
            own = mask_tile(
                embeddings, weights, biases, current, current, o_sites, m_sites, o_features, m_features, num_tasks, chosen,
                channels, s, RELATION, NEGATED,
            )  # fmt: skip
            cosine = tl.sum(direction(mask, m, eps) * direction(own, m, eps), 1)
            total += tl.sum(tl.where(m_sites, sigmoid(c * cosine), 0.0).to(tl.float64), 0)
        tl.store(rho + past, 1.0 - total / sites)


@triton.jit(do_not_specialize=["tasks", "num_tasks", "chosen"])
def task_masks_backward_kernel(
    grad, embeddings, weights, biases, d_embeddings, d_weights, d_biases, scale, tasks, num_tasks, chosen, channels,
    HELD: tl.constexpr, LISTED: tl.constexpr, RELATION: tl.constexpr, NEGATED: tl.constexpr,
    TASKS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """All gradients of one site, some channels at a time."""
    site = tl.program_id(0).to(tl.int64)
    s = scale_of(scale, HELD)
    o_tasks = tl.arange(0, TASKS)
    m_tasks = o_tasks < num_tasks
    width = 2 * num_tasks - 1 if NEGATED else num_tasks
    for done in range(0, channels, FEATURES):
        o_features = done + tl.arange(0, FEATURES)
        m_features = o_features < channels
        m = m_tasks[:, None] & m_features[None, :]
        o_values = ((site * num_tasks + o_tasks) * channels)[:, None] + o_features[None, :]
        values = tl.load(embeddings + o_values, mask=m, other=0.0)
        if RELATION:
            values = tanh(s * values)
        d_values = tl.zeros([TASKS, FEATURES], tl.float32)
        for position in range(chosen):
            task = task_of(tasks, position, LISTED)
            o_mask = site * chosen + position
            if RELATION:
                o_weights = o_mask * width + column_of(task, o_tasks, NEGATED)
                weight = tl.load(weights + o_weights, mask=m_tasks, other=0.0)
                if NEGATED:
                    m_negated = m_tasks & (o_tasks != task)
                    weight -= tl.load(weights + o_weights + 1, mask=m_negated, other=0.0)
                logit = tl.sum(weight[:, None] * values, 0) + tl.load(biases + o_mask)
            else:
                logit = tl.sum(tl.where((o_tasks == task)[:, None], values, 0.0), 0)
            mask = sigmoid(s * logit)
            d_mask = tl.load(grad + o_mask * channels + o_features, mask=m_features, other=0.0)
            d_logit = d_mask * (1.0 - mask) * mask * s
            if RELATION:
                d_values += weight[:, None] * d_logit[None, :]
                d_weight, d_bias = tl.sum(values * d_logit[None, :], 1), tl.sum(d_logit, 0)
                if done > 0:
                    d_weight += tl.load(d_weights + o_weights, mask=m_tasks, other=0.0)
                    d_bias += tl.load(d_biases + o_mask)
                tl.store(d_weights + o_weights, d_weight, mask=m_tasks)
                if NEGATED:
                    tl.store(d_weights + o_weights + 1, -d_weight, mask=m_negated)
                tl.store(d_biases + o_mask, d_bias)
            else:
                d_values += tl.where((o_tasks == task)[:, None], d_logit[None, :], 0.0)
        if RELATION:
            # Not 1 - tanh^2, which cancels where tanh is near 1.
            power = tl.exp(-2.0 * tl.abs(s * tl.load(embeddings + o_values, mask=m, other=0.0)))
            d_values = d_values * (4.0 * power / ((1.0 + power) * (1.0 + power))) * s
        tl.store(d_embeddings + o_values, d_values, mask=m)
        # Another thread may read it for the next channels.
        tl.debug_barrier()


def forward(
    own: Parameters, s: float | Tensor, tasks: tuple[int, ...], teacher: Parameters | None = None, c: float = 6.0,
    current: int = 0, eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Masks, and with a teacher its masks and the sampling rates that follow from both.

    Args:
        own: floating parameters; arithmetic is float32. teacher: of all its J tasks.
        s: mask scale, a number or a tensor of one on the device.
        tasks: the n chosen tasks; with a teacher all, in order.
        c: scale of the cosine. current: the task that the teacher's masks are compared with. eps: least length of a mask in it.

    Returns:
        `[S, n, f]` and `[S, J, f]` of the parameters' dtype, and float64 `[J]`; J is 0 without a teacher.
    """
    device, dtype = own.embeddings.device, own.embeddings.dtype
    sites, num_tasks, channels = own.embeddings.shape
    past = 0 if teacher is None else teacher.embeddings.shape[1]
    masks = torch.empty((sites, len(tasks), channels), dtype=torch.float32, device=device)
    teacher_masks = torch.empty((sites, past, channels), dtype=torch.float32, device=device)
    rho = torch.empty(past, dtype=torch.float64, device=device)
    wide, its = _wide(own), _wide(own if teacher is None else teacher)
    features = triton.next_power_of_2(channels)
    at_once = max(1, _TILES.rows * _TILES.columns // features)
    launch(
        task_masks_kernel, (len(tasks) + past,), _TILES, device, embeddings=wide[0], weights=wide[1], biases=wide[2],
        masks=masks, teacher_embeddings=its[0], teacher_weights=its[1], teacher_biases=its[2], teacher_masks=teacher_masks,
        rho=rho, **_choice(s, tasks, device), sites=sites, num_tasks=num_tasks, chosen=len(tasks), teacher_tasks=past,
        current=current, channels=channels, c=float(c), eps=eps, RELATION=own.weights is not None,
        NEGATED=own.negated, TEACHER_RELATION=teacher is not None and teacher.weights is not None,
        TEACHER_NEGATED=teacher is not None and teacher.negated, SITES=min(at_once, triton.next_power_of_2(sites)),
        FEATURES=features,
    )  # fmt: skip
    return masks.to(dtype), teacher_masks.to(dtype), rho


def backward(grad: Tensor, own: Parameters, s: float | Tensor, tasks: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of embeddings, weights and biases (empty where there are none) from that of the masks `[S, n, f]`, with the same
    bits in every run. Arguments as `forward`."""
    device, dtype = own.embeddings.device, own.embeddings.dtype
    sites, num_tasks, channels = own.embeddings.shape
    wide = _wide(own)
    gradients = [
        torch.empty((0,) if part is None else part.shape, dtype=torch.float32, device=device) for part in own[:3]
    ]
    rows = triton.next_power_of_2(num_tasks)
    features = min(triton.next_power_of_2(channels), max(16, _TILES.rows * _TILES.columns // rows))
    launch(
        task_masks_backward_kernel, (sites,), _TILES, device, grad=grad.float().contiguous(), embeddings=wide[0],
        weights=wide[1], biases=wide[2], d_embeddings=gradients[0], d_weights=gradients[1], d_biases=gradients[2],
        **_choice(s, tasks, device), num_tasks=num_tasks, chosen=len(tasks), channels=channels,
        RELATION=own.weights is not None, NEGATED=own.negated, TASKS=rows, FEATURES=features,
    )  # fmt: skip
    d_embeddings, d_weights, d_biases = (gradient.to(dtype) for gradient in gradients)
    return d_embeddings, d_weights, d_biases


def _wide(parameters: Parameters) -> list[Tensor]:
    """Parameters as the kernels read them; embeddings in place of weights and biases where there are none."""
    return [(parameters.embeddings if part is None else part).float().contiguous() for part in parameters[:3]]


def _choice(s: float | Tensor, tasks: tuple[int, ...], device: torch.device) -> dict[str, object]:
    """Scale and chosen tasks for the kernels. Only a list of tasks with gaps is copied to the device, once."""
    first = tasks[0] if tasks else 0
    listed = tasks != tuple(range(first, first + len(tasks)))
    return {
        "scale": s if isinstance(s, Tensor) else float(s), "HELD": isinstance(s, Tensor),
        "tasks": _list(tasks, device) if listed else first, "LISTED": listed,
    }  # fmt: skip


@lru_cache(maxsize=256)
def _list(tasks: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(tasks, dtype=torch.int32, device=device)
