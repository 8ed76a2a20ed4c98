"""Registers operations with PyTorch whose arguments and results are NamedTuples, so that each of them is spelled once.

A schema of PyTorch is flat. Here it follows from the fields: tensors, numbers, strings, lists of int, and nested NamedTuples,
whose fields get its name in front (`head.weight` is `head_weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from teracon_fast.ops import backends

_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool", str: "str", list[int]: "int[]",
}  # fmt: skip
_KINDS: dict[Any, tuple[type, type]] = {}  # of each registered operation: arguments and results


class Gradient(NamedTuple):
    """How an operation is differentiated with respect to its first result; the others carry no gradient.

    Attributes:
        setup: `setup(ctx, arguments, results)`, called after the operation where a gradient may be wanted.
        backward: `backward(ctx, gradient of the first result)`: gradients by flat name of the argument. Ones that are not wanted
            may hold anything.
    """

    setup: Callable[[Any, Any, Any], None]
    backward: Callable[[Any, Tensor], Mapping[str, Tensor | None]]


@lru_cache
def _fields(kind: type) -> tuple[tuple[str, Any], ...]:
    return tuple(get_type_hints(kind).items())


@lru_cache
def _leaves(kind: type) -> dict[str, str]:
    """Flat names of all fields, and their types in a schema."""

    def walk(kind: type, front: str) -> Iterator[tuple[str, str]]:
        for name, part in _fields(kind):
            if part in _TYPES:
                yield front + name, _TYPES[part]
            else:
                yield from walk(part, f"{front}{name}_")

    return dict(walk(kind, ""))


def flat(arguments: tuple[Any, ...]) -> list[Any]:
    """The fields of a NamedTuple, with those of nested ones in their place: what a registered operation takes."""
    found: list[Any] = []
    for value in arguments:
        if isinstance(value, tuple):
            found += flat(value)
        else:
            found.append(value)
    return found


@lru_cache
def _parts(kind: type) -> tuple[tuple[int, Any], ...]:
    """Of each field where its leaves begin, and its type if that is a NamedTuple."""
    sizes = [0, *(1 if part in _TYPES else len(_leaves(part)) for _, part in _fields(kind))]
    return tuple((at, None if part in _TYPES else part) for at, (_, part) in zip(accumulate(sizes), _fields(kind), strict=False))


def nested(kind: Any, values: Sequence[Any], begin: int = 0) -> Any:
    """The NamedTuple of the flat values from `begin` on."""
    return kind._make([values[begin + at] if part is None else nested(part, values, begin + at) for at, part in _parts(kind)])


def register(
    name: str, arguments: type, results: type, run: str | Callable[[Any], Any], fake: Callable[[Any], Any],
    backward: Any = None, without: Collection[str] = (),
) -> Any:  # fmt: skip
    """Register `teracon_fast::<name>`.

    Args:
        name: of the operation.
        arguments, results: NamedTuples; all results are tensors.
        run: from arguments to results; "masked_conv.forward": that function of the operation's backend, see `implementation`.
        fake: the same in shapes and dtypes only.
        backward: a `Gradient`; or a registered operation, see `_by_operation`, which is not given the arguments in `without`.

    Returns:
        the operation, which takes flat arguments and returns a tuple of flat results, or the one that there is.
    """
    taken = ", ".join(f"{kind} {leaf}" for leaf, kind in _leaves(arguments).items())
    full, call = f"teracon_fast::{name}", _dispatched(run) if isinstance(run, str) else run
    # define + impl rather than custom_op: the latter imports the whole compiler at the first call, some seconds.
    torch.library.define(full, f"({taken}) -> ({', '.join('Tensor' for _ in _leaves(results))})")
    torch.library.impl(full, "default", lambda *values: _results(call(nested(arguments, values))))
    torch.library.register_fake(full, lambda *values: _results(fake(nested(arguments, values))))
    if isinstance(backward, Gradient):
        _by_functions(full, arguments, results, backward)
    elif backward is not None:
        _by_operation(full, arguments, results, backward, without)
    operation = getattr(torch.ops.teracon_fast, name).default
    _KINDS[operation] = arguments, results
    return operation


def _results(results: tuple[Any, ...]) -> Any:
    values = flat(results)
    return tuple(values) if len(values) > 1 else values[0]


def _by_functions(full: str, arguments: type, results: type, gradient: Gradient) -> None:
    names = list(_leaves(arguments))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        gradient.setup(ctx, nested(arguments, inputs), nested(results, output))

    def autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        found = {} if grad is None else gradient.backward(ctx, grad)
        return tuple(found.get(name) if need else None for name, need in zip(names, ctx.needs_input_grad, strict=True))

    torch.library.register_autograd(full, autograd, setup_context=setup)


def _by_operation(full: str, arguments: type, results: type, operation: Any, without: Collection[str]) -> None:
    """The arguments of a backward operation are found by name: `grad`; `inputs`, all arguments of the forward one; one of its
    arguments or results; `need_<argument>`, whether its gradient is wanted. Results are gradients, by name too."""
    names, found = list(_leaves(arguments)), list(_leaves(results))
    takes, gives = _KINDS[operation]
    of_gradient = {name: number for number, name in enumerate(_leaves(gives))}
    sources: list[tuple[str, int]] = []  # of each flat argument behind `grad`
    for name, part in _fields(takes)[1:]:
        if name.startswith("need_"):
            sources.append(("need", names.index(name.removeprefix("need_"))))
        elif any(name == result for result, _ in _fields(results)):
            sources += [("result", found.index(leaf)) for leaf in found if leaf == name or leaf.startswith(f"{name}_")]
        else:
            given = names if part is arguments else [leaf for leaf in names if leaf.startswith(f"{name}_")]
            for leaf in given:
                kind = "tensor" if _leaves(arguments)[leaf].startswith("Tensor") else "number"
                sources.append(("none" if leaf in without else kind, names.index(leaf)))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        values = {"tensor": inputs, "result": output}
        ctx.save_for_backward(*[values[kind][at] for kind, at in sources if kind in values])
        ctx.numbers = [inputs[at] for kind, at in sources if kind == "number"]

    def autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(names)
        needs, tensors, numbers = ctx.needs_input_grad, iter(ctx.saved_tensors), iter(ctx.numbers)
        rest = {"tensor": tensors, "result": tensors, "number": numbers}
        gradients = operation(
            grad.contiguous(),
            *[needs[at] if kind == "need" else None if kind == "none" else next(rest[kind]) for kind, at in sources],
        )
        return tuple(
            gradients[of_gradient[name]] if need and name in of_gradient else None
            for name, need in zip(names, needs, strict=True)
        )

    torch.library.register_autograd(full, autograd, setup_context=setup)


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
