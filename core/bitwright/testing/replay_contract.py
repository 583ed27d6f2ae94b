"""The part of the backend contract about what a graph says: types, attributes, layouts, what is computed by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import pytest

from bitwright.graph import (
    LINEAR_KINDS,
    ActivationAttrs,
    AxisAttrs,
    BatchNormAttrs,
    ConvAttrs,
    Graph,
    OpKind,
    ParamId,
    PoolAttrs,
    output_channels,
)
from bitwright.testing.contract_base import Array, Case, Contract, everything
from bitwright.testing.op_types import wrong_type
from bitwright.testing.replay import replay


def _holds(kind: OpKind) -> Callable[[Graph], bool]:
    return lambda graph: any(op.kind is kind for op in graph)


FEATURES: Mapping[str, Callable[[Graph], bool]] = {
    "depthwise": lambda g: any(g.is_depthwise(op) for op in g),
    "forward fold": lambda g: any(
        op.kind is OpKind.BATCH_NORM
        and (user := g.sole_consumer(op.output)) is not None
        and user.kind in LINEAR_KINDS
        and ((before := g.producer(op.data_inputs[0])) is None or before.kind not in LINEAR_KINDS)
        for op in g
    ),
    "shared parameter": lambda g: any(len(g.users(p)) > 1 for p in g.params),
    "two inputs": lambda g: len(g.inputs) > 1,
    "two outputs": lambda g: len(g.outputs) > 1,
    "integer input": lambda g: any(np.dtype(g.tensors[t].dtype).kind in "iu" for t in g.inputs),
    "mask": lambda g: any(t.mask for t in g.tensors.values()),
    **{str(kind): _holds(kind) for kind in (
        OpKind.EMBEDDING, OpKind.MATMUL, OpKind.SOFTMAX, OpKind.LAYER_NORM, OpKind.AVERAGE_POOL, OpKind.PRELU,
        OpKind.MUL, OpKind.TRANSPOSE, OpKind.RECURRENT,
    )},
}  # fmt: skip
"""What the cases must have between them, beside `Contract.kinds`: what wrong backends have been seen to get wrong."""

_ATTRIBUTES: Mapping[OpKind, type] = {
    OpKind.CONV: ConvAttrs,
    OpKind.CONV_TRANSPOSE: ConvAttrs,
    OpKind.BATCH_NORM: BatchNormAttrs,
    OpKind.CLIPPED_RELU: ActivationAttrs,
    OpKind.AVERAGE_POOL: PoolAttrs,
    OpKind.SOFTMAX: AxisAttrs,
    OpKind.CONCAT: AxisAttrs,
    OpKind.SPLIT: AxisAttrs,
}
"""What ops of a kind can't do without."""


class ReplayContract(Contract):
    """What the graph says is what is computed.

    Attributes:
        other_types: types outside ONNX that the backend shows for ops which ONNX hasn't got.
    """

    other_types: ClassVar[frozenset[str]] = frozenset()

    def native_value(self, model: object, param: ParamId) -> Array:
        """A parameter's values as the framework keeps them; give it where a layout isn't the canonical one."""
        raise NotImplementedError

    @pytest.mark.parametrize("feature", FEATURES)
    def test_cases_cover_what_goes_wrong(self, feature: str) -> None:
        """Some case has it, or the backend declines it by name."""
        if feature in self.declines:
            pytest.skip(f"declined: {self.declines[feature]}")
        backend = self.backend()
        graphs = [backend.graph(case.model) for case in self._cases().values()]
        assert any(FEATURES[feature](graph) for graph in graphs), f"no case has it: {feature}; or list it in `declines`"

    def test_types_and_attributes_go_with_kinds(self, case: Case) -> None:
        """Types are ONNX's for the kind, as targets are keyed by them; attributes are those that the kind needs."""
        graph = self.backend().graph(case.model)
        faults = [f"{op.id}: {wrong}" for op in graph if (wrong := wrong_type(op, self.other_types)) is not None]
        for op in graph:
            needed = _ATTRIBUTES.get(op.kind)
            if needed is not None and not isinstance(op.attrs, needed):
                faults.append(f"{op.id}: a {op.kind} op needs {needed.__name__}, found {op.attrs}")
            if op.kind is OpKind.CLIPPED_RELU and isinstance(op.attrs, ActivationAttrs):
                low, high = op.attrs.minimum, op.attrs.maximum
                if low != 0 or high is None or high <= 0:
                    faults.append(f"{op.id}: a clipped ReLU goes from 0 to a positive number, not from {low} to {high}")
            if op.type == "LeakyRelu" and not (isinstance(op.attrs, ActivationAttrs) and op.attrs.alpha is not None):
                faults.append(f"{op.id}: a LeakyRelu needs its alpha")
        assert not faults, "\n".join(faults)

    def test_ops_compute_what_the_graph_says(self, case: Case) -> None:
        """Kind, type, attributes and parameters, run by the kit's kernels on what each op was given: equal numbers."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        values = everything(backend, case)
        params = backend.read(model, list(graph.params))
        tolerance = max(case.tolerance, 1e-5)
        faults, replayed = replay(graph, values, params, None, tolerance, lambda op, params: None)
        assert not faults, "\n".join(faults)
        linear = {op.id for op in graph.linear_ops}
        assert linear <= replayed, f"these linear ops couldn't be run by what the graph says: {linear - replayed}"

    def test_shapes_and_types_are_those_of_the_values(self, case: Case) -> None:
        """Tensors have the rank, the fixed lengths and the element type that the graph states."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        for t, value in everything(backend, case).items():
            told = graph.tensors[t]
            assert told.dtype == "bfloat16" or value.dtype.kind == np.dtype(told.dtype).kind, (t, value.dtype, told)
            if told.shape is not None:
                assert len(told.shape) == value.ndim, (t, value.shape, told)
                assert all(n in (None, m) for n, m in zip(told.shape, value.shape, strict=True)), (t, value.shape, told)
            if told.channel_axis is not None:
                assert -value.ndim <= told.channel_axis < value.ndim, (t, value.shape, told)

    def test_channels_lie_where_linear_ops_have_them(self, case: Case) -> None:
        """The output of a linear op, and of a batch norm, has its channels on the axis that the graph states."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        values = everything(backend, case)
        for op in graph.linear_ops:
            assert op.weight is not None
            if graph.tensors[op.output].channel_axis is None:
                continue
            axis = graph.tensors[op.output].channel_axis or 0
            assert values[op.output].shape[axis] == output_channels(op, graph.params[op.weight].shape), op.id
        for op in graph:
            if isinstance(op.attrs, BatchNormAttrs) and op.kind is OpKind.BATCH_NORM:
                width = graph.params[next(iter(op.params.values()))].shape[0]
                assert values[op.output].shape[op.attrs.axis] == width, op.id

    def test_parameters_lie_as_their_layout_says(self, case: Case) -> None:
        """Canonical axis i is native axis `layout[i]`: the axes of exported encodings follow from it."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        if type(self).native_value is ReplayContract.native_value:
            moved = [p.id for p in graph.params.values() if p.layout not in (None, tuple(range(len(p.shape))))]
            assert not moved, f"{moved[0]!r} has a layout of its own: give `native_value`, so that it can be checked"
            pytest.skip("every layout is the canonical one; give `native_value` to have that checked")
        values = backend.read(model, list(graph.params))
        for p, param in graph.params.items():
            native = np.asarray(self.native_value(model, p))
            layout = tuple(range(native.ndim)) if param.layout is None else param.layout
            assert sorted(layout) == list(range(native.ndim)), (p, param.layout, native.shape)
            # Axes may be split or joined beside that: a depthwise kernel's channels and multiplier, a bias as a row.
            turned = native.transpose(layout).astype(np.float32)
            assert turned.size == values[p].size, (p, param.layout, native.shape)
            assert np.array_equal(turned.reshape(param.shape), values[p]), (p, param.layout, native.shape)
