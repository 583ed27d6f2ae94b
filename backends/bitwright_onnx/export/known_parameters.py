"""Parameters of the model that a file was made from, where the ops of the file read them in another form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright.graph import Graph, Param, ParamId
from bitwright.placement import Derived, Plan, SiteKind


def with_parameters(graph: Graph, model: ir.Model, plan: Plan, known: Mapping[ParamId, Param]) -> Graph:
    """A written model's graph with every parameter that a plan quantizes.

    A parameter's pair stands at the initializer, whatever reads it: TensorFlow spells PReLU with −slope, and a batch
    norm with γ/√(var + ε), so that no op of the written graph has it as its own.

    Args:
        graph: canonical, of the written model.
        model: in normal form.
        plan: made of the source's graph.
        known: the source's parameters, `layout` from the layout in which the framework has them.

    Raises:
        ModelError: a parameter is not an initializer of the model, or it is one in another shape.
    """
    found: dict[ParamId, Param] = {}
    for site in plan.quantized:
        tied = site if isinstance(plan[site].decision, Derived) else plan.root(site)
        if plan[site].kind is not SiteKind.PARAMETER or site in graph.params or tied in graph.params:
            continue
        value = model.graph.initializers.get(site)
        held = None if value is None else value.const_value
        own = None if held is None else _as_stored(known[site], list(held.shape))
        if own is None:
            raise ModelError(
                f"the QDQ model has no parameter {site!r}: the ops that read it read it in another form (layers that "
                "compute in float16 cast it), so that its codes have no place; build the model in float32, or leave "
                "the parameter in float"
            )
        found[site] = own
    if not found:
        return graph
    return Graph(graph.ops, graph.tensors, {**graph.params, **found}, graph.inputs, graph.outputs)


def _as_stored(param: Param, shape: Sequence[Any]) -> Param | None:
    """A parameter as an initializer of this shape holds it; None where axes are merged or split there."""
    native = tuple(int(n) for n in shape)
    order = param.layout or tuple(range(len(param.shape)))
    if len(order) == len(native) and tuple(native[i] for i in order) == param.shape:
        return param
    wide = [n for n in native if n != 1]
    if len(wide) <= 1 and [n for n in param.shape if n != 1] == wide:
        return replace(param, layout=None)
    return None
