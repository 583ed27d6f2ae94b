"""Layer reconstruction as a least-squares problem in moments: what AdaRound, SeqMSE and GPTQ all minimise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import Op, split_columns, to_matrix
from bitwright.statistics import LayerMoments

Array = NDArray[np.float64]
Inputs = Literal["asymmetric", "quantized", "float"]

_ROUNDOFF = 2.0**-22
"""Moments are sums of float32 products: an eigenvalue below this share of the largest is rounding noise."""
_PANEL = 192


class UnitGram(NamedTuple):
    """Second moments of mean diagonal 1 in single precision.

    Attributes:
        diagonal: as it was, (groups, K).
        unit: its mean, (groups,).
        gram: (groups, K, K).
    """

    diagonal: Array
    unit: Array
    gram: NDArray[np.float32]

    @classmethod
    def of(cls, gram: Array, into: NDArray[np.float32] | None = None) -> UnitGram:
        """Of a damped Ĥ, (groups, K, K); `into` is an array to write to."""
        unit = np.asarray(np.einsum("gkk->g", gram) / gram.shape[1])
        return cls(np.einsum("gkk->gk", gram).copy(), unit, _divided(gram, unit, into))


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Mean squared output error of one linear op as a function of its new weight matrix Ŵ.

    With x the columns of the float network, x̂ those of the quantized network and W the float weight, each output
    row has ``E(W x − Ŵ x̂)² = Ŵ Ĥ Ŵᵀ − 2 Ŵ (W C)ᵀ + W H Wᵀ`` (AdaRound, Nagel et al. 2020, eq. 21, in moments).
    Solvers see the damped error, which adds ``damping · ‖Ŵ − W‖²`` and equals
    ``(Ŵ − T)(Ĥ + damping·I)(Ŵ − T)ᵀ`` up to a constant; it is well posed for dead inputs, few samples, singular Ĥ.

    Attributes:
        weight: W, (groups, rows, K); where moments are in blocks, a group for each block, of whose outputs a row's
            output is the sum.
        undamped: makes Ĥ, (groups, K, K). It isn't held: a wide layer's takes as much as a part of the network.
        damping: (groups,).
        scaled: Ĥ + damping·I, of mean diagonal 1.
        target: T, minimiser of the damped error over real matrices, (groups, rows, K); W itself where x̂ = x.
        cross: W C, (groups, rows, K); None where x̂ = x, so that the error is that of Ŵ − W alone.
        energy: power of the output that is to be reproduced, (groups, rows): W H Wᵀ, or E(W x + r)² where the layer
            makes up for the error r of a skip connection.
    """

    weight: Array
    undamped: Callable[[], Array]
    damping: Array
    scaled: UnitGram
    target: Array
    cross: Array | None
    energy: Array

    def loss(self, values: NDArray[np.floating]) -> Array:
        """Mean squared output error of each row, without damping, (groups, rows)."""
        if self.cross is None:
            error = np.asarray(values - self.goal, np.float32)
            return self.undamp(_powers(error, self.unit_gram), np.einsum("grk,grk->gr", error, error, dtype=np.float64))
        values = values.astype(np.float64)
        product = values @ self.gram - self.damping[:, None, None] * values - 2 * self.cross
        return np.asarray(np.maximum(np.einsum("grk,grk->gr", values, product) + self.energy, 0.0))

    def undamp(self, power: NDArray[np.floating], squares: NDArray[np.floating]) -> Array:
        """`loss` where x̂ = x, of rows whose errors e = ŵ − W are known by e·unit_gram·eᵀ and their sums of squares.

        Args:
            power, squares: (groups, rows).
        """
        damped = power.astype(np.float64) * self.unit[:, None]
        return np.asarray(np.maximum(damped - squares * self.damping[:, None], 0.0))

    def relative_loss(self, values: NDArray[np.floating]) -> float:
        """Output error of all rows over the power of the output."""
        return self.relative(self.loss(values))

    def relative(self, loss: Array) -> float:
        """`loss` of all rows over the power of the output."""
        return float(loss.sum()) / max(float(self.energy.sum()), float(np.finfo(np.float64).tiny))

    def objective(self, values: NDArray[np.floating]) -> Array:
        """Damped error of each row, less its minimum over real matrices, (groups, rows), in float64."""
        error = values - self.target
        return np.asarray(np.einsum("grk,grk->gr", error @ self.gram, error))

    @property
    def gram(self) -> Array:
        """Ĥ + damping·I, (groups, K, K), made anew each time."""
        gram = self.undamped()
        np.einsum("gkk->gk", gram)[...] += self.damping[:, None]
        return gram

    @property
    def diagonal(self) -> Array:
        """Of the damped Ĥ, (groups, K)."""
        return self.scaled.diagonal

    @property
    def unit(self) -> Array:
        """Mean diagonal of the damped Ĥ, (groups,): what `unit_gram` is divided by."""
        return self.scaled.unit

    @property
    def unit_gram(self) -> NDArray[np.float32]:
        """Damped Ĥ of mean diagonal 1, safe in float32 whatever the input's magnitude."""
        return self.scaled.gram

    @cached_property
    def goal(self) -> NDArray[np.float32]:
        """T in float32."""
        return self.target.astype(np.float32)

    @property
    def single(self) -> NDArray[np.float32]:
        """W in float32."""
        return self.goal if self.target is self.weight else self.weight.astype(np.float32)

    def quick_objective(self, values: NDArray[np.float32]) -> Array:
        """`objective` with products in float32: for comparing many candidates."""
        return self._power(values - self.goal)

    def _power(self, error: NDArray[np.float32]) -> Array:
        """Damped output power of rows, (groups, rows), with products in float32."""
        return _powers(error, self.unit_gram).astype(np.float64) * self.unit[:, None]


def _divided(gram: Array, unit: Array, into: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Ĥ over a number for each group, in single precision."""
    single = np.empty(gram.shape, np.float32) if into is None else into
    return np.divide(gram, unit[:, None, None], out=single, casting="same_kind")


def _powers(matrix: NDArray[np.float32], gram: NDArray[np.float32]) -> NDArray[np.float32]:
    """Diagonal of ``M Ĥ Mᵀ``, (groups, rows): half of Ĥ, which is symmetric, is enough."""
    power = np.zeros(matrix.shape[:2], np.float32)
    for begin in range(0, matrix.shape[2], _PANEL):
        panel = slice(begin, begin + _PANEL)
        own = matrix[..., panel]
        power += np.einsum("grk,grk->gr", own @ gram[:, panel, panel], own)
        if begin:
            power += 2 * np.einsum("grk,grk->gr", matrix[..., :begin] @ gram[:, :begin, panel], own)
    return power


def reconstruction(
    op: Op,
    weight: NDArray[np.floating],
    moments: LayerMoments,
    *,
    free_bias: bool = True,
    damping: float = 0.05,
    inputs: Inputs = "asymmetric",
) -> Reconstruction:
    """Set up the problem of one layer.

    Args:
        op, weight: the op and its float weight in canonical layout.
        moments: of its input.
        free_bias: the bias absorbs any difference of means (`corrected_bias`), so only centred moments count.
        damping: share of the mean diagonal of Ĥ that is added to it.
        inputs: "asymmetric": x for the target and x̂ for the candidate; "quantized": x̂ for both; "float": x for both.

    Where the moments know the error r of a tensor that is added to the output (`LayerMoments.residual`), the layer is
    to give W x + r: what its sum is to be, less what the quantized skip connection brings.

    Raises:
        FloatingPointError: the moments aren't finite.
    """
    matrix = np.asarray(split_columns(to_matrix(op, weight), moments.blocks), np.float64)
    same = not moments.paired or inputs != "asymmetric"
    second = partial(moments.second, centred=free_bias)
    undamped = partial(second, "xx" if inputs == "float" else "qq")
    gram = undamped()
    features = gram.shape[1]
    # The largest eigenvalue is at most the trace: the noise of a wide layer is larger beside its mean diagonal. Inputs
    # are float32 numbers themselves, so that none is known better than by that share of its size.
    trace = np.einsum("gkk->g", gram)
    if not np.isfinite(trace).all():
        raise FloatingPointError("the squares of its inputs overflow float32")
    means = np.square(moments.mean_quantized if inputs != "float" else moments.mean).sum(axis=1) if free_bias else 0.0
    own = np.square(_ROUNDOFF) * (trace + means)
    ridge = np.maximum(damping * trace / features, np.maximum(_ROUNDOFF * trace, own))
    # An input that never changes makes any weight as good as another: stay near W.
    ridge = np.where(ridge > np.finfo(np.float32).tiny, ridge, 1.0)
    if same:
        unit = np.maximum(trace / features, np.finfo(np.float32).tiny)
        single = _divided(gram, unit)
        energy = _powers(matrix.astype(np.float32), single) * unit[:, None]
        np.einsum("gkk->gk", gram)[...] += ridge[:, None]
        return Reconstruction(matrix, undamped, ridge, UnitGram.of(gram, single), matrix, None, energy)
    energy = np.einsum("grk,grk->gr", matrix @ second("xx"), matrix)
    cross = matrix @ second("xq")
    if moments.has_residual:
        if free_bias:
            rx, rq, square = moments.centred_residual()
        else:
            rx, rq, _, square = moments.residual
        cross = cross + rq[None]
        energy = energy + (2 * np.einsum("rk,rk->r", matrix[0], rx) + square)[None]
    right = cross + ridge[:, None, None] * matrix
    np.einsum("gkk->gk", gram)[...] += ridge[:, None]
    target = np.swapaxes(np.linalg.solve(gram, np.swapaxes(right, 1, 2)), 1, 2)
    return Reconstruction(matrix, undamped, ridge, UnitGram.of(gram), target, cross, energy)


def corrected_bias(
    op: Op,
    weight: NDArray[np.floating],
    replaced: NDArray[np.floating],
    bias: NDArray[np.floating] | None,
    moments: LayerMoments,
) -> NDArray[np.float32]:
    """Bias that keeps the mean output: ``b + W E[x] + E[r] − Ŵ E[x̂]``, (out,); with it the squared error is least.

    r is the error of a tensor that is added to the output, where the moments know it.
    """
    mean, quantized = (m.reshape(len(m) // moments.blocks, -1) for m in (moments.mean, moments.mean_quantized))
    before = np.einsum("grk,gk->gr", to_matrix(op, weight).astype(np.float64), mean)
    after = np.einsum("grk,gk->gr", to_matrix(op, replaced).astype(np.float64), quantized)
    shift = (before - after).reshape(-1)
    if moments.has_residual:
        shift = shift + moments.residual[2]
    return np.asarray(shift if bias is None else bias + shift, np.float32)
