"""Registers operations with PyTorch whose arguments and results are NamedTuples, so that each of them is spelled once.

A schema of PyTorch is flat. Here it follows from the fields: tensors, numbers, strings, lists of int, and nested NamedTuples,
whose fields get their name in front (`head.weight` is `head_weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from teracon_fast.ops import backends

_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool", str: "str", list[int]: "int[]",
}  # fmt: skip
Needs = Mapping[str, bool]  # by the flat name of an argument: whether its gradient is wanted


class Gradient(NamedTuple):
    """How an operation is differentiated with respect to its first result; the others carry no gradient.

    Attributes:
        setup: `setup(ctx, arguments, results)`, called after the operation where a gradient may be wanted; see `save`.
        backward: `backward(ctx, gradient of the first result, needs)`: a NamedTuple of gradients whose flat names are those
            of arguments. Ones that are not wanted may hold anything.
    """

    setup: Callable[[Any, Any, Any], None]
    backward: Callable[[Any, Tensor, Needs], tuple[Any, ...]]


@lru_cache
def _fields(kind: type) -> tuple[tuple[str, Any], ...]:
    return tuple(get_type_hints(kind).items())


@lru_cache
def _leaves(kind: type) -> tuple[tuple[str, str], ...]:
    """Flat names of all fields and their types in a schema."""

    def walk(kind: type, front: str) -> Iterator[tuple[str, str]]:
        for name, part in _fields(kind):
            if part in _TYPES:
                yield front + name, _TYPES[part]
            else:
                yield from walk(part, f"{front}{name}_")

    return tuple(walk(kind, ""))


def flat(arguments: tuple[Any, ...]) -> list[Any]:
    """The fields of a NamedTuple, with those of nested ones in their place: what a registered operation takes."""
    found: list[Any] = []
    for value in arguments:
        if isinstance(value, tuple):
            found.extend(flat(value))
        else:
            found.append(value)
    return found


def nested(kind: Any, values: Iterable[Any]) -> Any:
    """The NamedTuple of flat values; of an iterator it takes as many as it has fields."""
    rest = iter(values)
    return kind(*[next(rest) if part in _TYPES else nested(part, rest) for _, part in _fields(kind)])


def register(
    name: str, arguments: type, results: type, run: str | Callable[[Any], Any], fake: Callable[[Any], Any],
    gradient: Gradient | None = None,
) -> Any:  # fmt: skip
    """Register `teracon_fast::<name>`.

    Args:
        name: of the operation.
        arguments, results: NamedTuples; all results are tensors.
        run: from arguments to results; "masked_conv.forward": that function of the operation's backend, see `implementation`.
        fake: the same in shapes and dtypes only.

    Returns:
        the operation, which takes flat arguments and returns a tuple of flat results, or the one that there is.
    """
    names = [leaf for leaf, _ in _leaves(arguments)]
    taken = ", ".join(f"{kind} {leaf}" for leaf, kind in _leaves(arguments))
    full, call = f"teracon_fast::{name}", _dispatched(run) if isinstance(run, str) else run
    # define + impl rather than custom_op: the latter imports the whole compiler at the first call, some seconds.
    torch.library.define(full, f"({taken}) -> ({', '.join('Tensor' for _ in _leaves(results))})")
    torch.library.impl(full, "default", lambda *values: _results(call(nested(arguments, values))))
    torch.library.register_fake(full, lambda *values: _results(fake(nested(arguments, values))))
    if gradient is not None:
        setup, backward = gradient

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.set_materialize_grads(False)
            setup(ctx, nested(arguments, inputs), nested(results, output))

        def autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            if grad is None:
                return (None,) * len(names)
            needs = dict(zip(names, ctx.needs_input_grad, strict=True))
            found = backward(ctx, grad, needs)
            of = dict(zip((leaf for leaf, _ in _leaves(type(found))), flat(found), strict=True))
            return tuple(of[leaf] if needed else None for leaf, needed in needs.items())

        torch.library.register_autograd(full, autograd, setup_context=setup_context)
    return getattr(torch.ops.teracon_fast, name).default


def _results(results: tuple[Any, ...]) -> Any:
    values = flat(results)
    return tuple(values) if len(values) > 1 else values[0]


def implementation(operation: str, inputs: Any) -> Any:
    """The module of the backend that `inputs.backend` names, for the device and dtype of the first tensor."""
    main = inputs
    while not isinstance(main, Tensor):
        main = main[0]
    return backends.implementation(operation, inputs.backend, main.device, main.dtype)


def _dispatched(run: str) -> Callable[[Any], Any]:
    operation, function = run.split(".")
    # What backward takes has the inputs of forward inside.
    return lambda given: getattr(implementation(operation, getattr(given, "inputs", given)), function)(given)


def save(ctx: Any, *values: tuple[Any, ...]) -> None:
    """Keep NamedTuples for backward, see `saved`."""
    leaves = flat(values)
    ctx.save_for_backward(*(leaf if isinstance(leaf, Tensor) else None for leaf in leaves))
    ctx.kinds, ctx.others = [type(value) for value in values], [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def saved(ctx: Any) -> list[Any]:
    """What `save` kept."""
    leaves = iter([other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)])
    return [nested(kind, leaves) for kind in ctx.kinds]
