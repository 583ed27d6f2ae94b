"""From a JAX function to calls of primitives: what its jaxpr has, with functions inlined and a free sample axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.errors import InconclusiveDimensionOperation
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from bitwright.dataflow import GraphBuilder
from bitwright.errors import ModelError
from bitwright_jax.primitives import ELEMENTWISE, convert

SAMPLES = "samples"
"""The length of the sample axis while a function is traced."""
_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
            "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr",
            "remat2": "jaxpr", "checkpoint": "jaxpr"}  # fmt: skip
_PASSED = frozenset({"stop_gradient", "copy", "copy_p", "optimization_barrier", "pvary", "sharding_constraint"})


def traced(function: Callable[..., Any], params: Any, shapes: Sequence[tuple[tuple[int, ...], Any]]) -> ClosedJaxpr:
    """The jaxpr of `function(params, *inputs)`, with a free sample axis, or a fixed one where it needs to be known."""
    (free,) = export.symbolic_shape(SAMPLES)
    leaves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.asarray(x).dtype), params)
    inputs = [jax.ShapeDtypeStruct((free, *shape[1:]) if shape else (), dtype) for shape, dtype in shapes]
    fixed = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    try:
        return jax.make_jaxpr(function)(leaves, *inputs)
    except (InconclusiveDimensionOperation, jax.errors.JAXTypeError, TypeError, ValueError, NotImplementedError):
        return jax.make_jaxpr(function)(leaves, *fixed)  # it needs to know the number; an error of its own comes again


def fixed_to(value: Any, samples: Any) -> Any:
    """Parameters of a primitive with the sample axis' length put in."""
    if isinstance(value, tuple):
        found = [fixed_to(v, samples) for v in value]
        return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
    if isinstance(value, list):
        return [fixed_to(v, samples) for v in value]
    if export.is_symbolic_dim(value):
        return value._evaluate({SAMPLES: samples})
    return value


def lengths(shape: Sequence[Any]) -> tuple[int | None, ...]:
    """A shape with None for what depends on the number of samples."""
    return tuple(None if export.is_symbolic_dim(n) else int(n) for n in shape)


class Tracer:
    """Walks a jaxpr and tells a `GraphBuilder` of its primitives; keeps shapes of values in terms of the samples."""

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder = builder
        self.shapes: dict[str, str] = {}
        self._samples: str | None = None  # an input with a free sample axis

    def input(self, name: str, variable: Any) -> str:
        """An input of the function."""
        shape = lengths(variable.aval.shape)
        found = self.builder.input(name, shape, str(variable.aval.dtype))
        self.shapes[found] = ", ".join(map(str, variable.aval.shape))
        if shape[:1] == (None,):
            self._samples = self._samples or found
        return found

    def walk(self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[str]) -> list[str]:
        """The outputs of a jaxpr for these values."""
        held: dict[Any, str] = dict(zip(jaxpr.invars, arguments, strict=True))
        held |= {v: self.builder.constant(np.asarray(c)) for v, c in zip(jaxpr.constvars, consts, strict=True)}

        def value(atom: Any) -> str:
            if isinstance(atom, Literal):
                return self.builder.constant(np.asarray(atom.val, atom.aval.dtype))
            return held[atom]

        for eqn in jaxpr.eqns:
            results = self._eqn(eqn, [value(v) for v in eqn.invars])
            held.update(zip(eqn.outvars, results, strict=True))
        return [value(v) for v in jaxpr.outvars]

    def _eqn(self, eqn: Any, operands: list[str]) -> Sequence[str]:
        name = eqn.primitive.name
        if name in _INLINED:
            inner = eqn.params[_INLINED[name]]
            closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
            return self.walk(closed.jaxpr, closed.consts, operands)
        if name in _PASSED:
            return operands
        if name == "convert_element_type" and eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype:
            return operands
        shapes = [lengths(v.aval.shape) for v in eqn.outvars]
        symbolic = any(None in shape for shape in shapes)
        if symbolic and name in ("broadcast_in_dim", "reshape") and self.builder.known(operands[0]) is not None:
            return [self._for_all_samples(eqn, operands[0], shapes[0])]
        if name not in ELEMENTWISE:
            operands = [self._expanded(o, v.aval) for o, v in zip(operands, eqn.invars, strict=True)]
        if name == "dot_general":
            contract, batch = eqn.params["dimension_numbers"]
            dot = partial(_call, eqn, False, 0)
            return [self.builder.contraction(*operands, dot, contract=contract, batch=batch)]
        if symbolic and not operands and self._samples is not None:  # indices of samples, and the like
            operands, name = [self._samples], f"{name} of all samples"
        told = {"operands": operands, "function": partial(_call, eqn, name in ELEMENTWISE, len(shapes[0]))}
        told |= convert(eqn, operands, self.builder)
        dtypes = [str(v.aval.dtype) for v in eqn.outvars]
        found = self.builder.op(shapes=shapes, dtypes=dtypes, native=name, **told)
        for value, variable in zip(found, eqn.outvars, strict=True):
            self.shapes[value] = ", ".join(map(str, variable.aval.shape))
        return found

    def _for_all_samples(self, eqn: Any, operand: str, shape: Sequence[int | None]) -> str:
        """What is the same for all samples keeps one, and is broadcast where it is used."""
        if self.builder.shape(operand) == ():
            return operand
        places = eqn.params.get("broadcast_dimensions", range(len(shape)))
        held = self.builder.shape(operand)
        one = [1] * len(shape)
        for place, n in zip(places, held, strict=False):
            one[place] = n or 1
        target = tuple(one)
        return self.builder.op("Reshape", [operand], [target], lambda x: [jnp.reshape(x, target)], native="reshape")[0]

    def _expanded(self, operand: str, aval: Any) -> str:
        """A value that is the same for all samples, repeated for a primitive that doesn't broadcast."""
        wanted = lengths(getattr(aval, "shape", ()))
        if None not in wanted or self.builder.known(operand) is None or self._samples is None:
            return operand
        shape = tuple(aval.shape)

        def repeat(x: Any, like: Any) -> Sequence[Any]:
            return [jnp.broadcast_to(x, fixed_to(shape, like.shape[0]))]

        operands = [operand, self._samples]
        (found,) = self.builder.op("Expand", operands, [wanted], repeat, native="broadcast_in_dim")
        self.shapes[found] = ", ".join(map(str, shape))
        return found


def _call(eqn: Any, broadcast: bool, rank: int, *operands: Any) -> Sequence[Any]:
    """A primitive with the number of samples that its operands have."""
    arrays = [jnp.asarray(x) for x in operands]
    samples = _samples(eqn, arrays)
    if not eqn.invars and arrays:
        samples, arrays = arrays[0].shape[0], []
    params = {k: fixed_to(v, samples) for k, v in eqn.params.items()}
    if broadcast and len({a.shape for a in arrays}) > 1:
        arrays = [a if a.ndim == rank else jnp.reshape(a, (1,) * (rank - a.ndim) + a.shape) for a in arrays]
        shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
        arrays = [jnp.broadcast_to(a, shape) for a in arrays]
    with jax.enable_x64(any(a.dtype.itemsize == 8 for a in arrays)):
        found = eqn.primitive.bind(*arrays, **params)
    return found if eqn.primitive.multiple_results else [found]


def _samples(eqn: Any, arrays: Sequence[Any]) -> Any:
    """What the free length is, from the operands' shapes."""
    for variable, array in zip(eqn.invars, arrays, strict=False):
        for n, found in zip(getattr(variable.aval, "shape", ()), array.shape, strict=False):
            if export.is_symbolic_dim(n):
                none, one = (int(n._evaluate({SAMPLES: k})) for k in (0, 1))
                if none == 0 and one:  # a multiple of it
                    return found // one
    return 1


def named_leaves(params: Any) -> Mapping[str, Any]:
    """A pytree's arrays by their paths ("conv1.kernel"), in its own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    found: dict[str, Any] = {}
    for path, leaf in leaves:
        parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
        name = ".".join(parts[:-1] if parts[-1:] == ["value"] else parts) or "param"
        if name in found:
            raise ModelError(f"two parameters are called {name!r}")
        found[name] = leaf
    return found
