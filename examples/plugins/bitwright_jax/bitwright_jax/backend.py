"""The JAX backend: `bitwright.dataflow` over `jax.numpy`, compiled by `jax.jit`."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from bitwright.backend import Batch, Tap
from bitwright.dataflow import Captured, DifferentiableFlow, FlowBackend, FlowModel, GraphBuilder, NumpyLike, Program
from bitwright.errors import ModelError
from bitwright.graph import Op, ParamRole
from bitwright.grids import FloatFormat
from bitwright_jax.tracing import SAMPLES, Tracer, named_leaves, traced
from bitwright_onnx.adapters import QdqExport


@dataclass(frozen=True)
class JaxFunction:
    """A pure function with its parameters, as `QuantSim` takes it.

    Attributes:
        function: `function(params, *inputs)`; the first axis of every input is samples.
        params: a pytree of arrays.
    """

    function: Callable[..., Any]
    params: Any

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, from the function's signature."""
        return tuple(inspect.signature(self.function).parameters)[1:]


@dataclass(frozen=True, eq=False)
class JaxModel(FlowModel):
    """A captured function, called as the user's own is, without its parameters; `shapes` of its values, for files."""

    shapes: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, *inputs: Any) -> Any:
        """Outputs for these inputs: one array, or a tuple."""
        taps = [Tap(t) for t in self.graph.outputs]
        ran = JaxBackend().session(self, taps).run(dict(zip(self.graph.inputs, inputs, strict=True)))
        return ran[taps[0]] if len(taps) == 1 else tuple(ran[t] for t in taps)


class JaxNamespace(NumpyLike):
    """jax.numpy, where its compiler needs to be held to the letter."""

    def divided(self, x: Any, by: float, /) -> Any:
        """A constant divisor becomes a product with its reciprocal, barrier or not; in double, right for single."""
        with jax.enable_x64(True):
            wide = lax.convert_element_type(x, jnp.float64)
            return lax.convert_element_type(lax.div(wide, lax.full_like(wide, by)), x.dtype)

    def stop(self, x: Any, /) -> Any:
        """x, without a gradient."""
        return lax.stop_gradient(x)

    def float64(self, x: Any, /) -> Any:
        """In double, whatever JAX is configured to."""
        with jax.enable_x64(True):
            return lax.convert_element_type(x, jnp.float64)

    def exactly(self) -> Any:
        """JAX has no double precision unless it is told."""
        return jax.enable_x64(True)

    def cast(self, x: Any, format: FloatFormat, /) -> Any:
        """bfloat16's smallest numbers are float32's, which XLA flushes: cast by the hardware's own."""
        if format == "bfloat16":
            return lax.reduce_precision(x, 8, 7)
        return super().cast(x, format)


@dataclass(frozen=True, eq=False)
class Stored:
    """The function of an op as a file keeps it: StableHLO (`jax.export`), and the roles of its parameters, in order."""

    roles: tuple[ParamRole, ...]
    blob: bytes

    def __call__(self, inputs: Sequence[Any], params: Mapping[ParamRole, Any]) -> Sequence[Any]:
        """Run it."""
        found: Sequence[Any] = export.deserialize(bytearray(self.blob)).call(*inputs, *(params[r] for r in self.roles))
        return found


class JaxBackend(QdqExport, DifferentiableFlow, FlowBackend[JaxModel]):
    """Functions with a pytree of parameters (`JaxFunction`), and `flax.nnx` modules."""

    name = "jax"
    model_type = JaxModel
    namespace = JaxNamespace(jnp, jax.scipy.special.erf)
    gradient = staticmethod(jax.grad)
    file_format = ("jaxq", "the float function in StableHLO, one for each op, and its parameters")

    def owns(self, model: object) -> bool:
        """Its own models, `JaxFunction`s and `flax.nnx` modules."""
        return isinstance(model, JaxModel | JaxFunction) or _is_module(model)

    def adopt(self, model: object, sample: Batch | None = None) -> JaxModel:
        """Trace what the user holds."""
        if isinstance(model, JaxModel):
            return model
        given = model if isinstance(model, JaxFunction) else _of_module(model) if _is_module(model) else None
        if given is None:
            raise ModelError(f"the JAX backend takes a JaxFunction or an nnx.Module, got {type(model).__name__}")
        if not isinstance(sample, Mapping):
            raise ModelError("a JAX function has no shapes of its own: give a sample batch, by input name")
        names = given.inputs if set(given.inputs) <= set(sample) else tuple(sample)[: len(given.inputs)]
        if len(names) < len(given.inputs):
            raise ModelError(f"the function takes {', '.join(given.inputs)}; the sample has {', '.join(sample)}")
        arrays = [np.asarray(sample[n]) for n in names]
        shapes = [(a.shape, jnp.asarray(a[:1]).dtype) for a in arrays]
        try:
            jaxpr = traced(given.function, given.params, shapes)
        except Exception as error:
            raise ModelError(f"the function can't be traced: {error}") from error
        builder = GraphBuilder()
        leaves = named_leaves(given.params)
        tracer = Tracer(builder)
        arguments = [builder.param(n, v) for n, v in leaves.items()]
        variables = jaxpr.jaxpr.invars[len(arguments) :]
        arguments += [tracer.input(n, v) for n, v in zip(names, variables, strict=True)]
        outputs = tracer.walk(jaxpr.jaxpr, jaxpr.consts, arguments)
        made = builder.build(JaxModel, outputs)
        return replace(made, shapes=tracer.shapes)

    def compile_program(self, program: Program) -> Program:
        """XLA."""
        return jax.jit(program)  # type: ignore[no-any-return]

    def with_vjp(self, forward: Callable[..., Any], vjp: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        """For `jax.grad`."""
        found = jax.custom_vjp(forward)
        found.defvjp(lambda *given: (forward(*given), given), lambda given, g: vjp(g, *given))
        return found

    def array(self, x: Any) -> Any:
        """On the default device."""
        return jnp.asarray(x)

    def pack(self, model: JaxModel, op: Op) -> bytes:
        """StableHLO of the op's function, for any number of samples."""
        kept = model.native[op.id]
        if isinstance(kept, Captured):
            kept = _exported(model, op, kept)
        return json.dumps([r.value for r in kept.roles]).encode() + b"\n" + kept.blob

    def unpack(self, stored: Any) -> Stored:
        """The other way."""
        head, _, blob = stored.partition(b"\n")
        return Stored(tuple(ParamRole(r) for r in json.loads(head)), blob)


def _exported(model: JaxModel, op: Op, kept: Captured) -> Stored:
    scope = export.SymbolicScope()
    roles = tuple(kept.roles)

    def function(*operands: Any) -> Sequence[Any]:
        inputs = operands[: len(kept.inputs)]
        return kept(inputs, dict(zip(roles, operands[len(inputs) :], strict=True)))

    tensors = [model.graph.tensors[t] for t in op.data_inputs]
    plain = [", ".join(SAMPLES if n is None else str(n) for n in t.shape or ()) for t in tensors]
    texts = [model.shapes.get(v, p) for v, p in zip(kept.inputs, plain, strict=True)]
    shapes = [export.symbolic_shape(t, scope=scope) for t in texts]
    types = [t.dtype for t in tensors]
    arrays = [model.array(op.params[r], jnp.asarray) for r in roles]
    takes = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, types, strict=True)]
    takes += [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    blob = export.export(jax.jit(function))(*takes).serialize(vjp_order=1)
    return Stored(roles, bytes(blob))


def _is_module(model: object) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


def _of_module(model: Any) -> JaxFunction:
    """A copy of a module in evaluation, as a function of its state."""
    from flax import nnx

    copy = nnx.merge(*nnx.split(model))
    copy.eval()
    definition, state = nnx.split(copy)
    inputs = tuple(inspect.signature(type(model).__call__).parameters.values())[1:]

    def function(params: Any, *inputs: Any) -> Any:
        module = nnx.merge(definition, params)
        return module(*inputs)

    required = [p for p in inputs if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    first = inspect.Parameter("params", inspect.Parameter.POSITIONAL_ONLY)
    function.__signature__ = inspect.Signature([first, *(p.replace(kind=p.POSITIONAL_ONLY) for p in required)])  # type: ignore[attr-defined]
    return JaxFunction(function, state)
