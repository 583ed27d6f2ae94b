"""Whether an integer accumulator can overflow: the worst sum that a layer's weights and grids allow.

For output channel c with integer weights w = q_w − z_w and inputs within [x₋, x₊] = [q_min − z_x, q_max − z_x],

    high = Σ_{w>0} w·x₊ + Σ_{w<0} w·x₋ + q_b,     low = Σ_{w>0} w·x₋ + Σ_{w<0} w·x₊ + q_b,

the ℓ₁-norm bound of Colbert et al. (A2Q, 2023, §3) without its assumption of symmetric inputs. It is tight: some
input in the grid attains it, but for transposed convolutions, whose outputs see a part of the kernel each. Blockwise
weights with float scales have an accumulator for each block.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Params
from bitwright.errors import InputError
from bitwright.graph import Graph, Op, OpKind, ParamRole, groups_of, to_matrix
from bitwright.grids import Blockwise, Encoding, to_groups
from bitwright_analysis.records import Accumulator


def accumulators(graph: Graph, table: Mapping[str, Encoding], params: Params) -> list[Accumulator]:
    """Every linear op whose input and weight are on integer grids, in the order of the network."""
    found = []
    for op in graph.linear_ops:
        weight = op.weight
        if weight is None or weight not in table or op.data_inputs[0] not in table:
            continue
        grid, inputs = table[weight], table[op.data_inputs[0]]
        if grid.float_format is not None or inputs.float_format is not None or inputs.scale.ndim:
            continue
        found.append(_accumulator(op, grid, inputs, table, params))
    return found


def overflowing(rows: list[Accumulator], bits: int) -> list[Accumulator]:
    """The layers that a signed accumulator of so many bits can't hold, the widest first.

    Raises:
        InputError: an accumulator has 8 to 64 bits.
    """
    if not 8 <= bits <= 64:
        raise InputError(f"accumulator_bits={bits}: accumulators have 8 to 64 bits")
    return sorted((r for r in rows if r.bits > bits), key=lambda r: -r.int32)


def _accumulator(
    op: Op, grid: Encoding, inputs: Encoding, table: Mapping[str, Encoding], params: Params
) -> Accumulator:
    assert op.weight is not None
    values = np.asarray(params[op.weight])
    _, zero = grid.spread(values.shape)
    codes = grid.quantize(values).astype(np.int64) - zero
    rows = _rows(op, grid, codes)
    zero_in = int(inputs.zero_point)
    low_in, high_in = inputs.grid.qmin - zero_in, inputs.grid.qmax - zero_in
    positive, negative = np.maximum(rows, 0).sum(axis=-1), np.minimum(rows, 0).sum(axis=-1)
    high = positive * high_in + negative * low_in
    low = positive * low_in + negative * high_in
    bias = op.params.get(ParamRole.BIAS)
    if bias is not None and bias in table and len(high) == table[bias].quantize(np.asarray(params[bias])).size:
        added = table[bias].quantize(np.asarray(params[bias])).astype(np.int64).reshape(-1)
        high, low = high + added, low + added
    top, bottom = int(high.max()), int(low.min())
    k = rows.shape[-1]
    widest = max(abs(grid.grid.qmin - int(grid.zero_point.max())), abs(grid.grid.qmax - int(grid.zero_point.min())))
    factor = 1 if grid.block_scale is None else int(grid.block_scale.max())
    any_sum = k * widest * factor * max(abs(low_in), abs(high_in))
    return Accumulator(
        op=op.id,
        type=op.type,
        inputs=k,
        low=float(bottom),
        high=float(top),
        bits=max(width_of(top), width_of(bottom)),
        any_weights=width_of(any_sum),
        int32=max(top / (2**31 - 1), bottom / -(2**31)),
    )


def _rows(op: Op, grid: Encoding, codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Integer weights as (output channels, products in one accumulator)."""
    layout = grid.granularity
    if isinstance(layout, Blockwise):
        blocks = np.asarray(to_groups(codes, layout), np.int64)
        if grid.block_scale is None:
            return blocks.reshape(-1, blocks.shape[-1])
        return (blocks * grid.block_scale[..., None]).reshape(len(blocks), -1)
    if op.kind is not OpKind.CONV_TRANSPOSE:
        return codes.reshape(len(codes), -1)
    matrix = to_matrix(op, codes.astype(np.float64))
    return np.asarray(matrix, np.int64).reshape(groups_of(op) * matrix.shape[1], -1)


def width_of(value: int) -> int:
    """Bits of the narrowest two's-complement integer that holds a value."""
    return 1 + (value.bit_length() if value >= 0 else (-value - 1).bit_length())
