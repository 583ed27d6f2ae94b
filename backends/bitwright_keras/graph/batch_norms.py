"""A weight, its bias and its grid as they are once the batch norm behind has become a part of the convolution.

A file format without batch norms folds them: w' = w·γ/σ, b' = β + (b − μ)·γ/σ. A symmetric grid goes along exactly,
scale by scale: s' = s·|γ/σ|, and the codes change sign with γ/σ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError
from bitwright.graph import BatchNormAttrs, Graph, Op, OpKind, ParamRole, batch_norm_fold
from bitwright.grids import Encoding, PerChannel

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Folded:
    """A linear op's numbers with the batch norm behind it folded in.

    Attributes:
        weight, bias: float, canonical layout.
        encoding: the weight's grid; None in float.
        codes: the weight's integers: those of the unfolded weight but for signs, which rounding can't change.
    """

    weight: Values
    bias: Values
    encoding: Encoding | None
    codes: NDArray[np.int32] | None


def folded(
    graph: Graph, op: Op, params: Mapping[str, Values], weight: Values, bias: Values, encoding: Encoding | None
) -> Folded:
    """The op's weight, bias and encoding with the batch norm behind it folded in; as they are where there is none.

    Raises:
        EncodingError: the weight's grid isn't symmetric.
    """
    norm = graph.sole_consumer(op.output)
    fold = None if norm is None else batch_norm_fold(graph, norm)
    if norm is None or fold is None or fold.direction != "backward" or fold.into.id != op.id:
        return Folded(weight, bias, encoding, None if encoding is None else encoding.quantize(weight))
    assert isinstance(norm.attrs, BatchNormAttrs)
    numbers: dict[ParamRole, Any] = {r: np.asarray(params[p], np.float64) for r, p in norm.params.items()}
    factor = numbers[ParamRole.GAMMA] / np.sqrt(numbers[ParamRole.VAR] + norm.attrs.epsilon)
    shift = numbers[ParamRole.BETA] - numbers[ParamRole.MEAN] * factor
    axis = 1 if op.kind is OpKind.CONV_TRANSPOSE else 0
    along = factor.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    values, moved = (weight * along).astype(np.float32), (bias * factor + shift).astype(np.float32)
    if encoding is None:
        return Folded(values, moved, None, None)
    if not encoding.symmetric or (np.asarray(encoding.zero_point) != 0).any():
        raise EncodingError(
            f"the batch norm {norm.id!r} can't be folded into {op.id!r}, whose weights aren't symmetric: fold batch "
            "norms first (fold_batch_norm)"
        )
    # A channel that is switched off has the code 0 everywhere, on any grid.
    scale = np.where(factor == 0, 1.0, np.abs(factor)) * np.broadcast_to(encoding.scale, factor.shape)
    zero = np.zeros(factor.shape, np.int32)
    grid = encoding.with_(scale=scale.astype(np.float32), zero_point=zero, granularity=PerChannel(axis))
    codes = encoding.quantize(weight) * np.sign(along).astype(np.int32)
    return Folded(values, moved, grid, codes)
