"""A model's canonical graph with all that it leaves unsaid: what is one op there, and says nothing of what it computes,
is here several that do. The others, and all names, are the same; so it is for who writes the model down.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import keras

from bitwright.backend import LazyValues
from bitwright.errors import ModelError
from bitwright.files import Array
from bitwright.graph import Graph, Op, OpKind, ParamId, TensorId, free_name, lacking
from bitwright_keras.capture.comparing import CaptureNotice
from bitwright_keras.capture.normalize import Normalizer
from bitwright_keras.capture.tracing import trace
from bitwright_keras.export.recurrent import recurrent_call
from bitwright_keras.export.spelled import recordable
from bitwright_keras.graph.canonical import canonical
from bitwright_keras.graph.model import KerasModel, Node, refs, substitute
from bitwright_keras.graph.native import input_of
from bitwright_keras.graph.params import read_params

DEPTH = 4
"""Layers within layers that are looked into."""


def complete(model: KerasModel, depth: int = DEPTH) -> tuple[Graph, Mapping[ParamId, Array]]:
    """The graph and the values of its parameters, read from the layers whenever they are asked for; ops that can't be
    looked into are left as they are."""
    found = canonical(model)
    graph = found.graph
    made = _Made(graph, {param: partial(_read, model, param) for param in graph.params})
    for op in graph:
        node = found.nodes[op.id][0]
        if lacking(op, graph) is None:
            made.ops.append(op)
        elif (call := recurrent_call(node)) is not None:
            made.ops.append(replace(op, call=call))
        elif depth and len(found.nodes[op.id]) == 1 and (inner := _inside(model, node)) is not None:
            made.splice(op, node, inner, *complete(inner, depth - 1))
        else:
            made.ops.append(op)
    return Graph(made.ops, made.tensors, made.params, graph.inputs, graph.outputs), LazyValues(made.reads)


def _read(model: KerasModel, param: ParamId) -> Array:
    return read_params(model, [param])[param]


def _inside(model: KerasModel, node: Node) -> KerasModel | None:
    """What a layer's `call` does with the activations of one of its calls; None where it can't be recorded."""
    if node.layer is None or not node.inputs:
        return None
    symbols = {t: input_of(f"x{i}", model.specs[t]) for i, t in enumerate(dict.fromkeys(node.inputs))}
    args, kwargs = substitute((node.args, dict(node.kwargs)), lambda ref: symbols[ref.id])
    kwargs.pop("training", None)
    inner = Normalizer()
    for symbol in symbols.values():
        inner.declare(symbol.name, symbol)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CaptureNotice)
            warnings.filterwarnings("ignore", message=".*does not support masking.*")
            recording = trace(recordable(node.layer), args, kwargs)
            flat = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
            given = {id(t): x for t, x in zip(recording.inputs, flat, strict=True)}
            outputs = inner.references(inner.inline(recording, given, ""))
    except ModelError:
        return None
    return KerasModel(node.op, tuple(s.name for s in symbols.values()), None, tuple(inner.nodes), outputs, inner.specs)


class _Made:
    """The graph in the making."""

    def __init__(self, graph: Graph, reads: Mapping[ParamId, Callable[[], Array]]) -> None:
        self.ops: list[Op] = []
        self.tensors, self.params, self.reads = dict(graph.tensors), dict(graph.params), dict(reads)
        self._taken = {*graph.tensors, *graph.params, *(op.id for op in graph)}

    def splice(self, op: Op, node: Node, inner: KerasModel, graph: Graph, values: Mapping[ParamId, Array]) -> None:
        """Put a layer's ops in the place of its one."""
        names: dict[TensorId, TensorId] = dict(zip(inner.inputs, dict.fromkeys(node.inputs), strict=True))
        passed: list[Op] = []
        for outer, tensor in zip(op.outputs, refs(inner.outputs), strict=True):
            if tensor in names:  # an input, or the same as another output
                passed.append(
                    Op(self._fresh(f"{outer}/passed"), OpKind.IDENTITY, "Identity", (names[tensor],), (outer,))
                )
            else:
                names[tensor] = outer
        for held in graph.tensors.values():
            if held.id not in names:
                names[held.id] = self._fresh(f"{op.id}/{held.id}")
                self.tensors[names[held.id]] = replace(held, id=names[held.id])
        params = {param: self._fresh(f"{op.id}/{param}") for param in graph.params}
        self.params |= {params[p.id]: replace(p, id=params[p.id]) for p in graph.params.values()}
        self.reads |= {params[p]: partial(values.__getitem__, p) for p in values}
        for made in graph:
            self.ops.append(
                replace(
                    made,
                    id=self._fresh(f"{op.id}/{made.id}"),
                    inputs=tuple(None if t is None else names[t] for t in made.inputs),
                    outputs=tuple(names[t] for t in made.outputs),
                    params={role: params[p] for role, p in made.params.items()},
                )
            )
        self.ops += passed

    def _fresh(self, name: str) -> str:
        chosen = free_name(name, self._taken, 2)
        self._taken.add(chosen)
        return chosen
