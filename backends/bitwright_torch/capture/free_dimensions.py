"""Which dimensions of a sample are to be free: the batch, or those that the user names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from bitwright.errors import InputError
from bitwright_torch.graph.calling import Arguments

DynamicShapes = Mapping[str, Any] | Sequence[Any] | None


def with_batch(arguments: Arguments, signature: inspect.Signature, *, doubled: bool = False) -> tuple[Arguments, Any]:
    """A free first axis for every tensor that has the first tensor's length there.

    A length of 1 would be taken for a constant, so such samples are doubled; others if asked to.
    """
    leaves, spec = pytree.tree_flatten((arguments.args, arguments.kwargs))
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim > 0]
    if not sizes:
        return arguments, None
    batch = sizes[0]
    shapes: list[Any] = []
    for i, leaf in enumerate(leaves):
        free = isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        shapes.append({0: Dim.AUTO} if free else None)
        if free and (batch == 1 or doubled):
            leaves[i] = torch.cat([leaf, leaf])
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    positional, named = pytree.tree_unflatten(shapes, spec)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()):
        return Arguments(args, kwargs), dict(signature.bind(*positional, **named).arguments)
    return Arguments(args, kwargs), (*positional, *named.values())


def asked_for(arguments: Arguments, shapes: DynamicShapes, signature: inspect.Signature) -> Any:
    """What the user asks for, as `torch.export` takes it.

    Raises:
        InputError: a dimension that shall be free is 1 long in the sample.
    """
    wanted = _spelled_out(arguments, shapes, signature)
    if _asks_of_one(wanted, arguments, signature):
        raise InputError(
            "a dimension that shall be free has length 1 in the sample, and export takes such lengths for fixed; "
            "give a sample that is at least 2 long there"
        )
    return wanted


def _spelled_out(arguments: Arguments, shapes: DynamicShapes, signature: inspect.Signature) -> Any:
    """Tuples of axes → `Dim.AUTO`; everything else as the user gave it."""

    def spell(value: Any) -> Any:
        if isinstance(value, tuple | list | set | frozenset) and value and all(isinstance(v, int) for v in value):
            return dict.fromkeys(value, Dim.AUTO)
        if isinstance(value, Mapping):
            return {k: Dim.AUTO if isinstance(v, str) else spell(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(spell(v) for v in value)
        return value

    if not isinstance(shapes, Mapping):
        return spell(shapes)
    bound = signature.bind(*arguments.args, **arguments.kwargs).arguments
    none = {name: pytree.tree_map(lambda _: None, value) for name, value in bound.items()}
    return {**none, **spell(shapes)}


def _asks_of_one(wanted: Any, arguments: Arguments, signature: inspect.Signature) -> bool:
    """Whether an axis that shall be free is 1 long."""

    def asks(spec: Any, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            free = [a for a, d in spec.items() if d is not None] if isinstance(spec, Mapping) else []
            return any(value.shape[a] == 1 for a in free if -value.ndim <= a < value.ndim)
        if isinstance(spec, Mapping) and isinstance(value, Mapping):
            return any(asks(spec[k], value[k]) for k in spec if k in value)
        if isinstance(spec, tuple | list) and isinstance(value, tuple | list):
            return any(asks(s, v) for s, v in zip(spec, value, strict=False))
        return False

    bound = signature.bind(*arguments.args, **arguments.kwargs).arguments
    return asks(wanted, dict(bound) if isinstance(wanted, Mapping) else tuple(bound.values()))


def fewest_of(shapes: DynamicShapes) -> int:
    """The smallest length of first axes that the user asks for: 1 unless a `Dim` says so."""
    found, stack = 1, [shapes]
    while stack:
        value: Any = stack.pop()
        if isinstance(value, Mapping):
            if 0 in value:
                found = max(found, int(getattr(value[0], "min", 1) or 1))
            stack += [v for v in value.values() if isinstance(v, Mapping | list | tuple)]
        elif isinstance(value, list | tuple):
            if value and hasattr(value[0], "min"):
                found = max(found, int(value[0].min or 1))
            stack += [v for v in value if isinstance(v, Mapping | list | tuple)]
    return found
