"""Weights whose kernels add products of neighbours in int16: what their codes must keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bitwright.graph import LINEAR_KINDS, ConvAttrs, Graph, Op, OpId, OpKind, ParamId, TensorId
from bitwright.grids import Dynamic, PerChannel, QuantSpec, pair_limit
from bitwright.placement._plan import Decision, SiteId


def limited_pairs(
    graph: Graph, decisions: Mapping[SiteId, Decision], spec_of: Callable[[SiteId], QuantSpec | None]
) -> dict[ParamId, QuantSpec]:
    """The specifications of weights for which sums of neighbours could pass int16, with their limit.

    Only weights with a scale for each channel: there a channel's scale is raised as far as that channel needs, where
    one scale for all would lose a bit in most. Convolutions that no product comes before are left out: their errors
    reach everything, and their share of the time is small (EfficientNet-Lite0's stem: 3 % of the products, and twice
    the noise of any other layer at the output). What is left out here is looked at when the export is written.

    Args:
        graph: the model.
        decisions: of all parameters.
        spec_of: specification in force at an activation, ties followed; None in float.
    """
    found: dict[ParamId, QuantSpec] = {}
    first = first_products(graph)
    for op in graph.linear_ops:
        if op.kind is OpKind.CONV and op.id in first:
            continue
        weight = op.weight
        if weight is None or not adds_in_pairs(op, graph.params[weight].shape):
            continue
        spec, inputs = decisions[weight], spec_of(op.data_inputs[0])
        if not isinstance(spec, QuantSpec) or spec.granularity != PerChannel(0) or spec.float_format is not None:
            continue
        if spec.bits != 8 or not (spec.signed and spec.symmetric):
            continue
        if inputs is None or inputs.float_format is not None or inputs.bits > 8 or inputs.granularity == Dynamic(True):
            continue  # the runtime multiplies in float
        found[weight] = spec.with_(pair_limit=pair_limit(8))
    return found


def adds_in_pairs(op: Op, weight_shape: tuple[int, ...]) -> bool:
    """Whether an op is a matrix product in integer kernels: depthwise convolutions and transposed ones are not."""
    if op.kind is OpKind.LINEAR:
        return True
    if op.kind is not OpKind.CONV:
        return False
    groups = op.attrs.groups if isinstance(op.attrs, ConvAttrs) else 1
    return not (groups > 1 and weight_shape[:2] == (groups, 1))


def first_products(graph: Graph) -> frozenset[OpId]:
    """Linear ops that no other linear op comes before."""
    behind: set[TensorId] = set()
    first = []
    for op in graph.ops:
        later = any(t in behind for t in op.data_inputs)
        if op.kind in LINEAR_KINDS and not later:
            first.append(op.id)
        if later or op.kind in LINEAR_KINDS or op.kind in (OpKind.MATMUL, OpKind.RECURRENT, OpKind.EMBEDDING):
            behind.update(op.outputs)
    return frozenset(first)
