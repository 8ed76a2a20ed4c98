"""Output masks of tasks at every site, and what a training step derives from them: the teacher's masks and sampling rates.

`m_t = sigmoid(s * (w_t @ tanh(s * [e_t ; e_i, -e_i for i != t]) + b_t))`, or plain `sigmoid(s * e_t)`;
`rho_j = 1 - mean over sites of sigmoid(c * cos(teacher's mask of j, current mask))` (Eq. 12, 13, 6 and 15 of the TERACON paper).

The `torch` backend is the formulas themselves; `triton` has all of it in one launch forward and one backward.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.ops import backends

MaskVariant = Literal["relation", "positive_only", "none"]


def check_variant(variant: str) -> MaskVariant:
    """The variant itself, or a ConfigError that lists the known ones."""
    if variant not in get_args(MaskVariant):
        raise ConfigError(f"mask variant is {variant!r}, expected one of {list(get_args(MaskVariant))}")
    return variant  # type: ignore[return-value]


def relation_width(num_tasks: int, variant: MaskVariant = "relation") -> int:
    """Number of relation weights per task and site: 2T-1, or T without the negated rows."""
    return 2 * num_tasks - 1 if variant == "relation" else num_tasks


class MaskParameters(NamedTuple):
    """What masks are formed from, stacked over sites.

    Attributes:
        embeddings: floating `[S, T, f]`, task embeddings of T tasks.
        weights: `[S, n, 2T-1]` ("positive_only": `[S, n, T]`), relation weights of n tasks; None for plain masks (Eq. 6).
        biases: `[S, n]`; None for plain masks.
        variant: "relation" or "positive_only"; unused for plain masks.
    """

    embeddings: Tensor
    weights: Tensor | None = None
    biases: Tensor | None = None
    variant: MaskVariant = "relation"


class StepMasks(NamedTuple):
    """Masks of a training step.

    Attributes:
        masks: `[S, T, f]`, the student's, of all tasks; differentiable with respect to its parameters.
        teacher: `[S, J, f]`, of the J past tasks.
        rho: float64 `[J]`, share of users that retention draws for each past task in the next step.
    """

    masks: Tensor
    teacher: Tensor
    rho: Tensor


def task_masks(
    embeddings: Tensor, weights: Tensor | None, biases: Tensor | None, s: float | Tensor, *, variant: str = "relation",
    tasks: tuple[int, ...] | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Masks of the chosen tasks at every site.

    Arithmetic is that of the parameters' dtype, on `triton` float32, whatever autocast says.

    Args:
        embeddings, weights, biases, variant: as in `MaskParameters`; weights and biases are those of the chosen tasks.
        s: mask scale; a tensor of one number where the embeddings are, so that a CUDA graph can be replayed with another scale.
            It has a gradient on the `torch` backend only.
        tasks: the n chosen tasks, counted from 0, repeats allowed; None for all T, in order.
        backend: "auto", "torch", or another that `teracon_fast.env_report()` lists as available.

    Returns:
        `[S, n, f]` in [0, 1], differentiable once with respect to embeddings, weights and biases.

    Raises:
        ShapeError: when shapes, dtypes or devices do not fit, or a task is not in 0..T-1. ConfigError: unknown variant.
        BackendError: when an explicitly requested backend is not available for this input.
    """
    parameters = MaskParameters(embeddings, weights, biases, check_variant(variant))
    chosen = _check("task_masks", parameters, s, tasks)
    masks: Tensor = _implementation(backend, embeddings).task_masks(parameters, s, chosen)
    return masks


def step_masks(
    student: MaskParameters, teacher: MaskParameters, s: float | Tensor, c: float = 6.0, *, current: int | None = None,
    backend: str = "auto",
) -> StepMasks:  # fmt: skip
    """Masks of student and teacher for one training step, and the sampling rates of the next one.

    Args:
        student: of all T tasks. teacher: of all its J tasks, frozen: it gets no gradient.
        s: mask scale of both, as in `task_masks`.
        c: scale of the cosine.
        current: the task in training, counted from 0; None for the student's last.
        backend: as in `task_masks`.

    Raises: as `task_masks`.
    """
    _check("step_masks, student", student, s, None)
    _check("step_masks, teacher", teacher, s, None)
    embeddings, its_embeddings = student.embeddings, teacher.embeddings
    like = embeddings.shape[0], embeddings.shape[2], embeddings.dtype, embeddings.device
    if (its_embeddings.shape[0], its_embeddings.shape[2], its_embeddings.dtype, its_embeddings.device) != like:
        raise ShapeError(
            f"step_masks: the teacher's embeddings are {its_embeddings.dtype} {list(its_embeddings.shape)} on "
            f"{its_embeddings.device}, expected {like[2]} [{like[0]}, J, {like[1]}] on {like[3]}"
        )
    current = embeddings.shape[1] - 1 if current is None else current
    if not 0 <= current < embeddings.shape[1]:
        raise ShapeError(f"step_masks: current is {current}, expected 0..{embeddings.shape[1] - 1}")
    return StepMasks(*_implementation(backend, embeddings).step_masks(student, teacher, s, c, current))


def _implementation(backend: str, embeddings: Tensor) -> Any:
    # Compilers see through this operation: they warn of caches, and trace no import but one that is written out.
    resolve = backends.resolve.__wrapped__ if torch.compiler.is_compiling() else backends.resolve
    if resolve(backend, "task_masks", embeddings.device, embeddings.dtype) == "triton":
        from teracon_fast.ops.task_masks import triton

        return triton
    from teracon_fast.ops.task_masks import torch as formulas

    return formulas


def _check(name: str, parameters: MaskParameters, s: float | Tensor, tasks: tuple[int, ...] | None) -> tuple[int, ...]:
    """The chosen tasks."""
    embeddings, weights, biases, variant = parameters
    if embeddings.dim() != 3 or not embeddings.dtype.is_floating_point:
        raise ShapeError(f"{name}: embeddings are {embeddings.dtype} {list(embeddings.shape)}, expected floating [S, T, f]")
    sites, count, _ = embeddings.shape
    chosen = tuple(range(count)) if tasks is None else tuple(tasks)
    if any(not 0 <= task < count for task in chosen):
        raise ShapeError(f"{name}: tasks are {list(chosen)}, expected numbers in 0..{count - 1}")
    if (weights is None) != (biases is None):
        raise ShapeError(f"{name}: weights and biases go together: one is given, the other is not")
    if isinstance(s, Tensor) and s.numel() != 1:
        raise ShapeError(f"{name}: s is {list(s.shape)}, expected one number")
    if weights is None or biases is None:
        return chosen
    expected = sites, len(chosen), relation_width(count, variant)
    for which, tensor, shape in (("weights", weights, expected), ("biases", biases, expected[:2])):
        if tuple(tensor.shape) != shape or tensor.dtype != embeddings.dtype or tensor.device != embeddings.device:
            raise ShapeError(
                f"{name}: {which} are {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected {embeddings.dtype} "
                f"{list(shape)} on {embeddings.device}, for variant {variant!r}"
            )
    return chosen
