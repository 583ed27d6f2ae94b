"""The native model of a dataflow backend: a graph, its numbers, and what the framework computes each op with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from numpy.typing import NDArray

from bitwright.dataflow._layouts import Layout
from bitwright.graph import Graph, Op, OpId, Param, ParamId, ParamRole, Tensor, TensorId
from bitwright.grids import Encoding

Array = Any
"""An array of the framework."""
Function = Callable[[Sequence[Array], Mapping[ParamRole, Array]], Sequence[Array]]
"""What an op computes: from its inputs that are present, in order, and its parameters by role, in their native
layout, all its outputs. Pure: the same for the same arguments, and nothing else changes."""
M = TypeVar("M", bound="FlowModel")


@dataclass(frozen=True)
class PutIn:
    """What an op computes that an edit has put in, and the base itself runs: "product" (of rows and a matrix, with a
    bias if there is one) or "sum"."""

    what: str


@dataclass(frozen=True, eq=False)
class FlowModel:
    """A graph with its numbers. Derive one for each backend: its type tells whose model it is.

    Attributes:
        graph: the canonical graph.
        params: values in canonical layout, float32.
        native: what the backend keeps of an op beside that: what `FlowBackend.function` works from.
        layouts: how the framework takes parameters; the canonical layout where there is none.
        encodings: fake quantization in force, by site; empty for a float model.
        programs: that sessions have compiled; shared by models that differ in numbers alone.
    """

    graph: Graph
    params: Mapping[ParamId, NDArray[Any]]
    native: Mapping[OpId, Any] = field(default_factory=dict)
    layouts: Mapping[ParamId, Layout] = field(default_factory=dict)
    encodings: Mapping[str, Encoding] = field(default_factory=dict)
    programs: dict[Any, Any] = field(default_factory=dict, repr=False)
    _arrays: dict[ParamId, tuple[Any, Any, Array]] = field(default_factory=dict, init=False, repr=False)

    def array(self, param: ParamId, convert: Callable[[NDArray[Any]], Array]) -> Array:
        """A parameter as functions take it: on its grid, if it has one, in native layout and of the framework.

        Args:
            param: its id.
            convert: a numpy array into the framework's.
        """
        value, encoding = self.params[param], self.encodings.get(param)
        held = self._arrays.get(param)
        if held is None or held[0] is not value or held[1] is not encoding:
            on_grid = value if encoding is None else encoding.fake_quantize(value)
            held = (value, encoding, convert(self.layouts.get(param, Layout()).native(on_grid)))
            self._arrays[param] = held
        return held[2]


def rebuild(
    model: M,
    ops: Sequence[Op],
    params: Mapping[ParamId, NDArray[Any]] | None = None,
    outputs: Sequence[TensorId] | None = None,
    copies: Mapping[ParamId, ParamId] | None = None,
    tensors: Sequence[Tensor] = (),
) -> M:
    """The model with other ops; tensors and parameters that nothing uses any more are dropped.

    Args:
        model: as it was.
        ops: of the new one.
        params: values; those of the model by default.
        outputs: of the new one; those of the model by default.
        copies: new parameters that lie as old ones do; others are canonical.
        tensors: that are new.
    """
    values = model.params if params is None else params
    used = {p for op in ops for p in op.params.values()}
    old = model.graph
    outputs = old.outputs if outputs is None else outputs
    live = {*old.inputs, *outputs, *(t for op in ops for t in (*op.data_inputs, *op.outputs))}
    known, layouts = dict(old.params), dict(model.layouts)
    for new, source in (copies or {}).items():
        known[new] = replace(old.params[source], id=new)
        if source in layouts:
            layouts[new] = layouts[source]
    shown = {**old.tensors, **{tensor.id: tensor for tensor in tensors}}
    graph = Graph(
        ops,
        {t: tensor for t, tensor in shown.items() if t in live},
        {p: known.get(p) or Param(p, values[p].shape) for p in values if p in used},
        old.inputs,
        outputs,
    )
    names = {op.id for op in ops}
    return replace(
        model,
        graph=graph,
        params={p: v for p, v in values.items() if p in used},
        native={o: n for o, n in model.native.items() if o in names},
        layouts={p: layout for p, layout in layouts.items() if p in used},
        programs={},
    )
