"""Batch-norm folding into a quantized weight's scales: the codes stay, so what training found is kept.

y = s·conv(x, Ŵ) + t with Ŵ = δ·(q − z) is conv(x, Ŵ′) + t with δ′ = |s|·δ for each output channel, and the same
codes where s > 0. Where s < 0 the codes are mirrored: q′ = qmin + qmax − q (with z mirrored too) on an asymmetric
grid; on a symmetric one q′ = −q, where the lowest code has no mirror image and is clipped by one step.

Folding arithmetic and its conditions are those of `fold_batch_norm`, backward only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Capability
from bitwright.graph import BatchNormAttrs, Op, OpKind, ParamId, ParamRole, edits
from bitwright.grids import Encoding, PerTensor, fixed_layout
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, Outcome, Report
from bitwright.technique import Settings as BaseSettings
from bitwright_techniques.fold_batch_norm import FoldBatchNorm, FoldBatchNormSettings


class FoldBatchNormToScaleSettings(BaseSettings):
    """There is nothing to set."""


class FoldBatchNormToScale:
    """Folds batch norms into the linear op before them after training, rescaling its weight's encoding."""

    name: ClassVar[str] = "fold_batch_norm_to_scale"
    Settings: ClassVar[type[BaseSettings]] = FoldBatchNormToScaleSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Any, plan: Plan, settings: Any) -> Iterable[Request]:
        """It needs no data."""
        return ()

    def apply(self, ctx: Context[FoldBatchNormToScaleSettings]) -> Outcome:
        """Fold where each output channel has scales of its own; other norms stay."""
        foldable: dict[ParamId, Encoding] = {}
        for op in ctx.graph.linear_ops:
            weight = op.weight
            encoding = None if weight is None else ctx.encodings.get(weight)
            if weight is not None and encoding is not None and _by_output(op, encoding):
                foldable[weight] = encoding
        # A per-tensor grid can't take a factor for each channel: it is shown frozen, which fold_batch_norm respects.
        rigid = {"frozen": True, "held_by": "their scales aren't those of output channels"}
        shown = {
            s: e.with_(frozen=False) if s in foldable else e.with_(**rigid) if s in ctx.graph.params else e
            for s, e in ctx.encodings.items()
        }
        settings = FoldBatchNormSettings(forward=False, standalone=False)
        # Another technique's settings make it another technique's context.
        folding = cast("Context[FoldBatchNormSettings]", replace(cast("Any", ctx), encodings=shown, settings=settings))
        inner = FoldBatchNorm().apply(folding)
        encodings: dict[ParamId, Encoding] = {}
        mirrored = 0
        for edit in inner.edits:
            if isinstance(edit, edits.FoldBatchNorm):
                weight = ctx.graph.op(edit.into).weight
                assert weight is not None
                if weight in foldable:
                    factor = _factor(ctx, ctx.graph.op(edit.batch_norm))
                    mirrored += int((factor < 0).sum())
                    # Of several norms behind a layer each has its factor.
                    encodings[weight] = _scaled(encodings.get(weight, foldable[weight]), factor)
        figures = {**inner.report.figures, "mirrored_channels": float(mirrored)}
        report = Report(inner.report.summary, figures, inner.report.columns, inner.report.rows)
        return replace(inner, encodings=encodings, report=report)


def _by_output(op: Op, encoding: Encoding) -> bool:
    """Whether scales belong to output channels (LPBQ's and blocks' rows do)."""
    layout = fixed_layout(encoding.granularity)
    if isinstance(layout, PerTensor) or encoding.float_format in ("float16", "bfloat16"):
        return False
    return layout.axis == (1 if op.kind is OpKind.CONV_TRANSPOSE else 0)


def _factor(ctx: Context[FoldBatchNormToScaleSettings], norm: Op) -> NDArray[np.float64]:
    assert isinstance(norm.attrs, BatchNormAttrs)
    var = np.asarray(ctx.params[norm.params[ParamRole.VAR]], np.float64)
    gamma = norm.params.get(ParamRole.GAMMA)
    scale = np.ones(var.size) if gamma is None else np.asarray(ctx.params[gamma], np.float64)
    return np.asarray(scale / np.sqrt(var + norm.attrs.epsilon))


def _scaled(encoding: Encoding, factor: NDArray[np.float64]) -> Encoding:
    column = factor.reshape(-1, *(1 for _ in encoding.scale.shape[1:]))
    # A channel that the norm switches off has weights of 0, on any grid.
    magnitude = np.where(column == 0, 1.0, np.abs(column))
    scale = np.maximum(encoding.scale * magnitude, np.finfo(np.float32).tiny).astype(np.float32)
    zero = encoding.zero_point
    if not encoding.symmetric and encoding.float_format is None:
        zero = np.where(column < 0, encoding.grid.qmin + encoding.grid.qmax - zero, zero).astype(np.int32)
    return encoding.with_(scale=scale, zero_point=zero, frozen=True)
