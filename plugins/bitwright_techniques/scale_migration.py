"""Choosing and applying factors along `scale_paths`: what smooth_quant and awq share.

A technique says which factors s it proposes for a parameter α; the least output error of the readers, measured on
sampled inputs with weights W·s and inputs x/s both on their grids, decides α. Factors of 1 are always among them.

Where there is no sample but the inputs' second moments H = E[x xᵀ] (a bank), the error of weights is exact on all data,
and that of inputs is the noise of rounding, Δ²/12 for each value, which the weights pass on::

    E‖W x − Ŵ x̂‖² = tr((Ŵ/s − W) H (Ŵ/s − W)ᵀ) + Σ Ŵ² Δ²/12

Zeros, those of a padded border included, count as values there, though they have no rounding error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import (
    LINEAR_KINDS,
    Graph,
    Op,
    OpId,
    ParamId,
    ParamRole,
    TensorId,
    from_matrix,
    groups_of,
    to_matrix,
)
from bitwright.grids import Encoding, encoding_from_range, encoding_of_weights
from bitwright.statistics import LayerMoments, RangeStatistic, Request, Statistic
from bitwright.technique import Context, Outcome, Report, frozen_note
from bitwright_techniques.bias_edits import bias_changes
from bitwright_techniques.input_sample import InputSample, input_axis_of, sample_request
from bitwright_techniques.scale_paths import Reader, ScalePath, find_paths

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Channels:
    """What factors are computed from, for each channel of a source, (channels,).

    Attributes:
        largest: max |x| over data and readers.
        mean: mean |x| over the sample; the root of mean x² where only moments are known.
        weight: max |W| over the readers' weights on that channel.
    """

    largest: Values
    mean: Values
    weight: Values


Proposal = Callable[[Channels, float], Values]
"""Factors s > 0 for a parameter α; entries that aren't finite or positive become 1."""


def migration_requests(graph: Graph, limit: int) -> Iterable[Request]:
    """Range and sample of the input of every reader."""
    paths, _ = find_paths(graph, lambda op: None, lambda tensor: True)
    for op in {r.op.id: r.op for path in paths for r in path.readers}.values():
        axis = input_axis_of(graph, op)
        yield Request(f"range/{op.id}", (op.data_inputs[0],), lambda axis=axis: RangeStatistic(axis))  # type: ignore[misc]
        yield sample_request(graph, op, f"sample/{op.id}", limit, or_moments=True)


def migrate(
    ctx: Context[Any], propose: Proposal, alphas: Sequence[float], *, quantized_inputs: bool, least_gain: float = 0.0
) -> Outcome:
    """Search and apply.

    Args:
        ctx: of the technique; its statistics are those of `migration_requests`.
        propose: the technique's formula.
        alphas: values that are tried.
        quantized_inputs: count the error of quantized inputs too, where the plan quantizes them.
        least_gain: share of the error that factors must remove to be taken.
    """
    paths, missed = find_paths(ctx.graph, lambda op: _obstacle(ctx, op), lambda t: not _frozen(ctx, t))
    columns = ("source", "readers", "alpha", "largest factor", "error before", "error after")
    scaled = _Scaled(ctx)
    rows: list[tuple[object, ...]] = []
    gains: list[float] = []
    ctx.progress.start("Choosing channel factors", len(paths))
    for path in paths:
        names = ", ".join(r.op.id for r in path.readers)
        alpha, factors, before, after = _searched(ctx, path, propose, alphas, quantized_inputs, least_gain)
        ctx.progress.advance(1, path.source.id)
        if np.isnan(alpha):
            rows.append((path.source.id, names, "none", 1.0, before, before))
            continue
        scaled.move(path, factors)
        gains.append(1 - after / before if before > 0 else 0.0)
        rows.append((path.source.id, names, alpha, float(np.exp(np.abs(np.log(factors)).max())), before, after))
    ctx.progress.finish()
    rows += [("none", op, reason, "", "", "") for op, reason in missed.items()]
    figures = {
        "scaled": float(len(gains)),
        "paths": float(len(paths)),
        "not_reached": float(len(missed)),
        "mean_gain": float(np.mean(gains)) if gains else 0.0,
    }
    summary = f"scaled the channels of {len(gains)} of {len(paths)} sources"
    if gains:
        summary += f"; their readers' output error fell by {100 * figures['mean_gain']:.0f} % on average"
    if missed:
        summary += f"; {len(missed)} layers have nothing before them that could absorb factors"
    if note := frozen_note(ctx):
        summary += f"; {note}"
    return scaled.outcome(Report(summary, figures, columns, tuple(rows)))


def _frozen(ctx: Context[Any], site: ParamId | TensorId) -> str:
    """Who has frozen the encoding of a site; empty if it may change."""
    encoding = ctx.encodings.get(ctx.plan.root(site) if site in ctx.plan else site)
    return "" if encoding is None or not encoding.frozen else encoding.held_by or encoding.source or "loaded"


def _obstacle(ctx: Context[Any], op: Op) -> str | None:
    roles = (ParamRole.WEIGHT, ParamRole.BIAS, ParamRole.GAMMA, ParamRole.BETA)
    for role in roles:
        id = op.params.get(role)
        if id is None:
            continue
        if len(ctx.graph.users(id)) > 1:
            return f"{id!r} is shared by several ops"
        if who := _frozen(ctx, id):
            return f"the encoding of {id!r} is frozen ({who})"
    return None


def _searched(
    ctx: Context[Any], path: ScalePath, propose: Proposal, alphas: Sequence[float], quantized: bool, least_gain: float
) -> tuple[float, Values, float, float]:
    """α (NaN for factors of 1), factors, and relative output error before and after; kept in the store."""
    key = f"factors/{path.source.id}"
    stored = ctx.store.get(key)
    if stored is not None:
        numbers = np.asarray(stored["numbers"], np.float64)
        return float(numbers[0]), np.asarray(stored["factors"], np.float64), float(numbers[1]), float(numbers[2])
    readers = [_Measured(ctx, reader, quantized) for reader in path.readers]
    seen = _channels(path, readers)
    best, ones = np.nan, np.ones(path.channels)
    before = after = _error(readers, ones)
    factors = ones
    for alpha in alphas:
        trial = _settled(propose(seen, alpha))
        error = _error(readers, trial)
        if error < after and error < before * (1 - least_gain):
            best, factors, after = alpha, trial, error
    ctx.store.put(key, {"numbers": np.array([best, before, after]), "factors": factors})
    return best, factors, before, after


def _settled(factors: Values) -> Values:
    """Factors with a geometric mean of 1 over the channels that have one, and 1 for the others."""
    alive = np.isfinite(factors) & (factors > 0)
    logs = np.log(np.where(alive, factors, 1.0))
    shift = logs[alive].mean() if alive.any() else 0.0
    return np.asarray(np.exp(np.where(alive, logs - shift, 0.0)).astype(np.float32), np.float64)


def _error(readers: Sequence[_Measured], factors: Values) -> float:
    return float(np.mean([reader.error(factors) for reader in readers]))


class _Measured:
    """One reader's output error as a function of the factors, on a sample of its input or on its moments."""

    def __init__(self, ctx: Context[Any], reader: Reader, quantized: bool) -> None:
        op = reader.op
        assert op.weight is not None
        seen, extent = ctx.statistics[f"sample/{op.id}"], ctx.statistics[f"range/{op.id}"]
        assert isinstance(extent, RangeStatistic)
        self.op, self.channel_of = op, reader.channel_of
        self.low, self.high = np.asarray(extent.low), np.asarray(extent.high)
        self.weight = np.asarray(ctx.params[op.weight], np.float32)
        self.spec = ctx.plan.spec(op.weight)
        self.input_spec = ctx.plan.spec(op.data_inputs[0]) if quantized else None
        self.inputs = (
            _Sampled(op, self.weight, seen) if isinstance(seen, InputSample) else _Known(op, self.weight, seen)
        )

    def error(self, factors: Values) -> float:
        """‖W x − Ŵ x̂‖² / ‖W x‖², Ŵ and x̂ being W·s and x/s on their grids."""
        given = factors[self.channel_of]
        weight = scale_inputs(self.op, self.weight, given)
        if self.spec is not None:
            weight = encoding_of_weights(weight, self.spec).fake_quantize(weight)
        grid = None
        if self.input_spec is not None:
            low, high = float((self.low / given).min()), float((self.high / given).max())
            grid = encoding_from_range(self.input_spec, low, high)
        return self.inputs.error(to_matrix(self.op, weight), _spread(self.op, self.weight.shape, given), grid)


class _Sampled:
    """On columns of the input, which are put on their grid.

    Attributes:
        mean: mean |x| of each feature, (groups, K).
    """

    def __init__(self, op: Op, weight: NDArray[np.float32], sample: InputSample) -> None:
        self._columns = sample.columns
        self._expected = np.matmul(to_matrix(op, weight), self._columns)
        self._power = max(float(np.square(self._expected, dtype=np.float64).sum()), float(np.finfo(np.float32).tiny))
        self.mean = np.abs(self._columns).mean(axis=2, dtype=np.float64)

    def error(self, matrix: NDArray[np.floating], factors: Values, grid: Encoding | None) -> float:
        """Relative output error for a weight matrix that was multiplied by the factors, (groups, K), and rounded."""
        x = (self._columns / factors[..., None]).astype(np.float32)
        if grid is not None:
            x = grid.fake_quantize(x)
        error = np.matmul(matrix, x) - self._expected
        return float(np.square(error, dtype=np.float64).sum()) / self._power


class _Known:
    """On second moments of the input.

    Attributes:
        mean: root of mean x² of each feature, (groups, K).
    """

    def __init__(self, op: Op, weight: NDArray[np.float32], moments: Statistic) -> None:
        assert isinstance(moments, LayerMoments)
        self._squares, self._weight = moments.xx, to_matrix(op, weight).astype(np.float64)
        self._power = max(self._through(self._weight), float(np.finfo(np.float32).tiny))
        self.mean = np.sqrt(np.maximum(np.einsum("gkk->gk", self._squares), 0.0))

    def error(self, matrix: NDArray[np.floating], factors: Values, grid: Encoding | None) -> float:
        """See `_Sampled.error`."""
        error = self._through(matrix / factors[:, None] - self._weight)
        if grid is not None:
            error += float(np.einsum("grk,gk->", np.square(matrix, dtype=np.float64), self._noise(factors, grid)))
        return error / self._power

    def _through(self, matrix: NDArray[np.floating]) -> float:
        return float(np.einsum("grk,grk->", matrix @ self._squares, matrix))

    def _noise(self, factors: Values, grid: Encoding) -> Values:
        """Power of the rounding error of x/s, (groups, K)."""
        if grid.is_fixed:
            return np.full_like(factors, float(grid.scale) ** 2 / 12)
        # Steps grow with the values: the share of a value that is lost, over an octave from the feature's own size on.
        size = np.maximum(self.mean / factors, np.finfo(np.float32).tiny)[..., None]
        values = (size * 2.0 ** np.linspace(0, 1, 33)).astype(np.float32)
        lost = (grid.fake_quantize(values) - values.astype(np.float64)) / values
        return np.asarray(np.square(size[..., 0]) * np.square(lost).mean(axis=-1))


def _channels(path: ScalePath, readers: Sequence[_Measured]) -> Channels:
    largest, mean, weight = (np.zeros(path.channels) for _ in range(3))
    for reader in readers:
        matrix = np.abs(to_matrix(reader.op, reader.weight)).max(axis=1)
        np.maximum.at(weight, reader.channel_of, _by_channel(reader, matrix).max(axis=1))
        np.maximum.at(largest, reader.channel_of, np.maximum(np.abs(reader.low), np.abs(reader.high)))
        average = _by_channel(reader, reader.inputs.mean).mean(axis=1)
        counts = np.bincount(reader.channel_of, minlength=path.channels)
        mean += np.bincount(reader.channel_of, average, path.channels) / np.maximum(counts, 1) / len(readers)
    return Channels(largest, mean, weight)


def _by_channel(reader: _Measured, values: NDArray[np.floating]) -> NDArray[np.floating]:
    """(groups, K) → (input channels, taps)."""
    return values.reshape(len(reader.channel_of), -1)


def _spread(op: Op, shape: tuple[int, ...], factors: Values) -> Values:
    """A factor for each input channel → (groups, K)."""
    taps = int(np.prod(shape[2:], dtype=np.int64))
    return np.repeat(factors.reshape(groups_of(op), -1), taps, axis=1)


def scale_inputs(op: Op, weight: NDArray[np.floating], factors: Values) -> NDArray[np.float32]:
    """A weight whose columns are multiplied by a factor for each input channel."""
    matrix = to_matrix(op, weight) * _spread(op, weight.shape, factors)[:, None]
    return np.asarray(from_matrix(op, matrix, weight.shape), np.float32)


def scale_outputs(op: Op, weight: NDArray[np.floating], factors: Values) -> NDArray[np.float32]:
    """A weight whose rows are multiplied by a factor for each output channel."""
    matrix = to_matrix(op, weight)
    scaled = matrix * factors.reshape(matrix.shape[0], -1, 1)
    return np.asarray(from_matrix(op, scaled, weight.shape), np.float32)


class _Scaled:
    """Parameters as they change."""

    def __init__(self, ctx: Context[Any]) -> None:
        self.ctx = ctx
        self.params: dict[ParamId, NDArray[np.float32]] = {}
        self.biases: dict[OpId, NDArray[np.float32]] = {}
        self.folded: dict[OpId, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def move(self, path: ScalePath, factors: Values) -> None:
        """Divide the source's output by the factors and multiply its readers' weights."""
        source, down = path.source, 1 / factors
        if source.kind in LINEAR_KINDS:
            assert source.weight is not None
            self.params[source.weight] = scale_outputs(source, self._now(source.weight), down)
            bias = source.params.get(ParamRole.BIAS)
            if bias is not None:
                self.biases[source.id] = (self.ctx.params[bias] * down).astype(np.float32)
            if source.id in self.ctx.folded:
                gain, shift = self.ctx.folded[source.id]
                self.folded[source.id] = (gain * down).astype(np.float32), (shift * down).astype(np.float32)
        else:
            for role in (ParamRole.GAMMA, ParamRole.BETA):
                id = source.params.get(role)
                if id is not None:
                    self.params[id] = (self._now(id) * down).astype(np.float32)
        for reader in path.readers:
            assert reader.op.weight is not None
            weight = self._now(reader.op.weight)
            self.params[reader.op.weight] = scale_inputs(reader.op, weight, factors[reader.channel_of])

    def _now(self, id: ParamId) -> NDArray[np.float32]:
        return self.params[id] if id in self.params else np.asarray(self.ctx.params[id], np.float32)

    def outcome(self, report: Report) -> Outcome:
        """All changes."""
        params, edits = bias_changes(self.ctx.graph, self.biases)
        return Outcome({**self.params, **params}, {}, edits, self.folded, report)
