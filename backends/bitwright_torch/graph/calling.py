"""The user's calling convention: arguments of `forward` ↔ a flat list of tensors, and names for them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from bitwright.backend import FeedSpecs
from bitwright.errors import InputError

Spec = tuple[tuple[int | None, ...], str]


@dataclass(frozen=True)
class Arguments:
    """What `forward` is called with.

    Attributes:
        args, kwargs: positional and keyword arguments, with tensors in place of arrays.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def arguments_of(sample: Any, signature: inspect.Signature) -> Arguments:
    """Read a sample: a tensor or array, a tuple of arguments, or a mapping by argument name.

    A mapping whose keys aren't argument names is itself the one argument; so is a list. `Arguments` stay as they are.

    Raises:
        InputError: the arguments don't fit `forward`.
    """
    if isinstance(sample, Arguments):
        return sample
    values = pytree.tree_map(_as_tensor, sample)
    if isinstance(values, tuple):
        args, kwargs = values, {}
    elif isinstance(values, Mapping) and all(isinstance(k, str) and _takes(signature, k) for k in values):
        args, kwargs = (), dict(values)
    else:
        args, kwargs = (values,), {}
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join(signature.parameters)
        raise InputError(f"the sample doesn't fit forward({names}): {error}") from None
    return Arguments(bound.args, bound.kwargs)


def _as_tensor(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(leaf))
    return leaf


def _takes(signature: inspect.Signature, name: str) -> bool:
    parameter = signature.parameters.get(name)
    if parameter is not None:
        return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _in_order(value: Any, template: Any) -> Any:
    """A nested value with the keys of its dicts in the template's order, which has no meaning to the user's code."""
    if isinstance(value, dict) and isinstance(template, dict) and type(value) is type(template):
        if value.keys() != template.keys():
            return value
        ordered = copy.copy(value)
        ordered.clear()
        ordered.update((k, _in_order(value[k], part)) for k, part in template.items())
        return ordered
    if type(value) in (list, tuple) and type(value) is type(template) and len(value) == len(template):
        return type(value)(_in_order(v, t) for v, t in zip(value, template, strict=True))
    return value


@dataclass(frozen=True)
class CallingConvention:
    """How a captured model is called: exactly as the user's was.

    Attributes:
        signature: of the user's `forward`.
        given: names of the parameters that the sample gave.
        in_spec: structure of the given parameters' values.
        names: of the leaves, in order: the parameter's name, with the path inside it ("batch.image").
        constants: leaves that aren't tensors, by position; the captured graph holds for these values only.
        out_spec: structure of the result.
    """

    signature: inspect.Signature
    given: tuple[str, ...]
    in_spec: pytree.TreeSpec
    names: tuple[str, ...]
    constants: Mapping[int, Any]
    out_spec: pytree.TreeSpec

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call.

        Raises:
            InputError: other arguments, another structure, or another constant than were captured.
        """
        try:
            bound = self.signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise InputError(f"the model can't be called like this: {error}") from None
        for name, value in bound.items():
            if name not in self.given and not _is_default(self.signature.parameters[name], value):
                raise InputError(
                    f"argument {name!r} wasn't given when the model was captured; capture it with a sample that has it"
                )
        try:
            values = [bound[n] if n in bound else _default(self.signature.parameters[n]) for n in self.given]
        except KeyError as error:
            raise InputError(f"argument {error.args[0]!r} is missing; the model was captured with it") from None
        leaves, spec = pytree.tree_flatten(values)
        if spec != self.in_spec:
            template = pytree.tree_unflatten(range(self.in_spec.num_leaves), self.in_spec)
            leaves, spec = pytree.tree_flatten(_in_order(values, template))
        if spec != self.in_spec:
            raise InputError(f"the arguments have another structure than the captured ones ({self.in_spec})")
        for position, constant in self.constants.items():
            if not _same(leaves[position], constant):
                raise InputError(
                    f"argument {self.names[position]!r} is {leaves[position]!r}, but the model was captured with "
                    f"{constant!r}, which its graph contains; capture it again with the other value"
                )
        for position, leaf in enumerate(leaves):
            if position not in self.constants and not isinstance(leaf, torch.Tensor):
                raise InputError(
                    f"argument {self.names[position]!r} is {leaf!r}, but the model was captured with a tensor there"
                )
        return leaves

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The result in the user's structure."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)

    def call(self, batch: Mapping[str, Any]) -> list[Any]:
        """Leaves from tensors by name; constants fill in.

        Raises:
            InputError: a tensor is missing.
        """
        leaves: list[Any] = []
        for position, name in enumerate(self.names):
            if position in self.constants:
                leaves.append(self.constants[position])
            elif name in batch:
                leaves.append(batch[name])
            else:
                raise InputError(f"the batch has no array for input {name!r}; it holds {', '.join(batch) or 'nothing'}")
        return leaves

    @property
    def listed(self) -> frozenset[str]:
        """Names of leaves that are elements of a list or tuple, which may be samples of their own, as images are."""
        values = pytree.tree_unflatten(list(self.names), self.in_spec)
        found: set[str] = set()
        for given, value in zip(self.given, values, strict=True):
            several = self.signature.parameters[given].kind is inspect.Parameter.VAR_POSITIONAL
            leaves, _ = pytree.tree_flatten_with_path(value)
            found |= {str(name) for path, name in leaves if len(path) > several and hasattr(path[-1], "idx")}
        return frozenset(found)

    def specs(
        self,
        shapes: Mapping[str, Spec],
        computed: Collection[Sequence[int | None] | None] = (),
        turns: Callable[[], bool] = lambda: False,
    ) -> Mapping[str, Spec]:
        """What the core is told of inputs: elements of a list whose first axis is fixed are no batches of samples.

        Unless all inputs and all that is computed of them have the same first axis: then the network takes batches of
        that size. Outputs alone don't tell: of an image (C, H, W) another is made, but between them there are tensors
        with an axis of samples, or with other channels. Where that axis is as long as the list, it may be the list's
        own (three images of three channels, joined), and what the network computes has to tell.

        Args:
            shapes: of inputs, with their dtypes.
            computed: shapes of all other tensors, as far as they are known.
            turns: whether each sample is computed for itself (`bitwright_torch.simulate.samples.turns`); asked only
                where shapes leave it open.
        """
        listed = self.listed
        whole = any(n in listed and shape and (shape[0] or 0) > 1 for n, (shape, _) in shapes.items())
        first = {shape[0] if shape else None for shape in (*(s for s, _ in shapes.values()), *computed)}
        batches = whole and bool(computed) and len(first) == 1 and None not in first
        if batches and len(listed) in first:
            batches = turns()
        return FeedSpecs(shapes) if whole and not batches else dict(shapes)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensor inputs, in order."""
        return tuple(n for i, n in enumerate(self.names) if i not in self.constants)


def convention_of(signature: inspect.Signature, arguments: Arguments, out_spec: pytree.TreeSpec) -> CallingConvention:
    """The convention that a sample call shows."""
    bound = signature.bind(*arguments.args, **arguments.kwargs).arguments
    given = tuple(bound)
    leaves, in_spec = pytree.tree_flatten([bound[n] for n in given])
    names: list[str] = []
    for name in given:
        keyword = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        for path, _ in pytree.tree_flatten_with_path(bound[name])[0]:
            parts = [_key(k) for k in path]
            names.append(".".join(parts if keyword and parts else [name, *parts]))
    constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)}
    return CallingConvention(signature, given, in_spec, tuple(names), constants, out_spec)


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _is_default(parameter: inspect.Parameter, value: Any) -> bool:
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return not value
    return _same(value, parameter.default)


def _default(parameter: inspect.Parameter) -> Any:
    if parameter.default is inspect.Parameter.empty:
        raise KeyError(parameter.name)
    return parameter.default


def _same(value: Any, constant: Any) -> bool:
    if value is constant:
        return True
    return type(value) is type(constant) and not isinstance(value, torch.Tensor) and bool(value == constant)
