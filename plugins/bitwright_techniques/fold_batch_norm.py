"""Batch-norm folding: an inference batch norm is a scale and a shift for each channel, which a neighbour can absorb.

With s = γ/√(var + ε) and t = β − μ·s (Jacob et al. 2018, §3.2):

* backward, op → norm: W[o] ← s_o·W[o], b_o ← s_o·b_o + t_o;
* forward, norm → op: b_o ← b_o + Σ W[o, i]·t_i, W[:, i] ← s_i·W[:, i]. Padding zeros of the op would come after
  the shift, so a convolution must not pad;
* standalone, where neither is possible: the norm itself becomes y = s·x + t, which integer runtimes take.

All arithmetic is done in float64 and rounded to float32 once for each op.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Capability
from bitwright.graph import (
    LINEAR_KINDS,
    BatchNormAttrs,
    ConvAttrs,
    Graph,
    Op,
    OpId,
    OpKind,
    ParamId,
    ParamRole,
    TensorId,
    edits,
    from_matrix,
    input_channels,
    output_channels,
    to_matrix,
)
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, Outcome, Report, frozen_note
from bitwright.technique import Settings as BaseSettings
from bitwright_techniques.bias_edits import bias_changes

Values = NDArray[np.float64]


class FoldBatchNormSettings(BaseSettings):
    """What may be folded.

    Attributes:
        backward: fold a norm into the linear op before it.
        forward: fold what is left into the linear op after it.
        standalone: rewrite what is then left as scale and shift, in place.
    """

    backward: bool = True
    forward: bool = True
    standalone: bool = True


@dataclass
class Folding:
    """The state of one run: new weights and biases so far, and how the folds have rewired the graph."""

    ctx: Context[FoldBatchNormSettings]
    weights: dict[OpId, Values] = field(default_factory=dict)
    biases: dict[OpId, Values] = field(default_factory=dict)
    producers: dict[TensorId, Op] = field(default_factory=dict)
    params: dict[ParamId, NDArray[np.float32]] = field(default_factory=dict)
    edits: list[edits.Edit] = field(default_factory=list)
    folded: dict[OpId, tuple[NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=dict)
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    counts: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("backward", "forward", "standalone", "left"), 0.0)
    )

    @property
    def graph(self) -> Graph:
        """The graph before any fold."""
        return self.ctx.graph

    def value(self, op: Op, role: ParamRole, default: float, size: int) -> Values:
        """A parameter in float64, or a constant where the op has none."""
        id = op.params.get(role)
        return np.full(size, default) if id is None else np.asarray(self.ctx.params[id], np.float64)

    def weight(self, op: Op) -> Values:
        """The op's weight as it is now."""
        if op.id not in self.weights:
            self.weights[op.id] = self.value(op, ParamRole.WEIGHT, 0.0, 0)
        return self.weights[op.id]

    def bias(self, op: Op) -> Values:
        """The op's bias as it is now; zeros where it has none."""
        if op.id not in self.biases:
            size = output_channels(op, self.weight(op).shape)
            self.biases[op.id] = self.value(op, ParamRole.BIAS, 0.0, size)
        return self.biases[op.id]

    def note(self, norm: Op, into: str, how: str, remark: str = "") -> None:
        """One row of the report."""
        self.rows.append((norm.id, into, how, remark))
        self.counts[how] += 1


class FoldBatchNorm:
    """Folds every batch norm that has a linear neighbour, and rewrites the others as scale and shift."""

    name: ClassVar[str] = "fold_batch_norm"
    Settings: ClassVar[type[BaseSettings]] = FoldBatchNormSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: Any) -> Iterable[Request]:
        """It needs no data."""
        return ()

    def apply(self, ctx: Context[FoldBatchNormSettings]) -> Outcome:
        """Fold; backward pairs win over forward ones, and each norm goes into one op."""
        settings = ctx.settings
        run = Folding(ctx)
        left: list[tuple[Op, str]] = []
        norms = [op for op in ctx.graph if op.kind is OpKind.BATCH_NORM]
        if norms:
            ctx.progress.start("Folding batch norms", len(norms))
        waiting = []
        for norm in norms:
            reason = _fold_backward(run, norm) if settings.backward else "backward folding is off"
            if reason:
                waiting.append((norm, reason))
            ctx.progress.advance(1, norm.id)
        for norm, reason in waiting:
            ahead = _fold_forward(run, norm) if settings.forward else "forward folding is off"
            if ahead:
                left.append((norm, f"{reason}; {ahead}"))
        for norm, reason in left:
            done = settings.standalone and _rewrite(run, norm)
            run.note(norm, "", "standalone" if done else "left", reason)
        if norms:
            ctx.progress.finish()
        return _outcome(run, len(norms))


def _outcome(run: Folding, norms: int) -> Outcome:
    graph = run.graph
    biases, changes = bias_changes(graph, run.biases)
    params = run.params | biases
    for id, weight in run.weights.items():
        params[graph.op(id).params[ParamRole.WEIGHT]] = weight.astype(np.float32)
    folded = int(run.counts["backward"] + run.counts["forward"])
    summary = f"folded {folded} of {norms} batch norms" if norms else "the model has no batch norm"
    if standalone := int(run.counts["standalone"]):
        summary += f"; {standalone} rewritten as scale and shift"
    if left := int(run.counts["left"]):
        summary += f"; {left} left"
    if norms and (note := frozen_note(run.ctx)):
        summary += f"; {note}"
    report = Report(summary, dict(run.counts), ("batch norm", "into", "how", "remark"), tuple(run.rows))
    return Outcome(params, {}, [*run.edits, *changes], run.folded, report)


def _scale_shift(run: Folding, norm: Op) -> tuple[Values, Values]:
    """s and t of y = s·x + t for each channel."""
    assert isinstance(norm.attrs, BatchNormAttrs)
    mean = run.value(norm, ParamRole.MEAN, 0.0, 0)
    var = run.value(norm, ParamRole.VAR, 1.0, mean.size)
    gamma = run.value(norm, ParamRole.GAMMA, 1.0, mean.size)
    beta = run.value(norm, ParamRole.BETA, 0.0, mean.size)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(var + norm.attrs.epsilon)
        return scale, beta - mean * scale


def _unfit(run: Folding, op: Op, norm: Op, tensor: TensorId, channels: int) -> str:
    """Why a linear op can't take the norm's numbers; empty if it can."""
    weight = op.weight
    if weight is None:
        return f"{op.id!r} has no weight"
    if len(run.graph.users(weight)) > 1:
        return f"{op.id!r} shares its weight"
    encoding = run.ctx.encodings.get(weight)
    if encoding is not None and encoding.frozen:
        return f"the encoding of {op.id!r}'s weight is frozen ({encoding.held_by or encoding.source or 'loaded'})"
    scale, shift = _scale_shift(run, norm)
    if scale.size != channels:
        return f"{op.id!r} has {channels} channels, the norm {scale.size}"
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return "its variance is 0 or not finite"
    return "" if _on_channels(run.graph, op, norm, tensor) else f"it doesn't normalize the channels of {op.id!r}"


def _on_channels(graph: Graph, op: Op, norm: Op, tensor: TensorId) -> bool:
    known = graph.tensors[tensor]
    assert isinstance(norm.attrs, BatchNormAttrs)
    if known.shape is None:
        rank = len(op.attrs.kernel) + 2 if isinstance(op.attrs, ConvAttrs) else 2
    else:
        rank = len(known.shape)
    own = 1 if known.channel_axis is None else known.channel_axis
    axis = rank - 1 if op.kind is OpKind.LINEAR else own  # features are last, wherever others have the channels
    return axis % rank == norm.attrs.axis % rank


def _fold_backward(run: Folding, norm: Op) -> str:
    """Fold into the producer; returns why not."""
    source = norm.data_inputs[0]
    op = run.producers.get(source) or run.graph.producer(source)
    if op is None or op.kind not in LINEAR_KINDS:
        return "no linear op before it"
    if run.graph.sole_consumer(source) is not norm:
        return f"the output of {op.id!r} is used elsewhere too"
    if op.weight is None:
        return f"{op.id!r} has no weight"
    channels = output_channels(op, run.graph.params[op.weight].shape)
    if reason := _unfit(run, op, norm, source, channels):
        return reason
    scale, shift = _scale_shift(run, norm)
    weight, bias = run.weight(op), run.bias(op)
    matrix = to_matrix(op, weight)
    scaled = matrix * scale.reshape(*matrix.shape[:2], 1)
    run.weights[op.id] = np.asarray(from_matrix(op, scaled, weight.shape), np.float64)
    run.biases[op.id] = bias * scale + shift
    run.producers[norm.output] = op
    run.edits.append(edits.FoldBatchNorm(norm.id, op.id))
    gamma = run.value(norm, ParamRole.GAMMA, 1.0, channels).astype(np.float32)
    beta = run.value(norm, ParamRole.BETA, 0.0, channels).astype(np.float32)
    run.folded[op.id] = gamma, beta
    run.note(norm, op.id, "backward")
    return ""


def _fold_forward(run: Folding, norm: Op) -> str:
    """Fold into the only reader; returns why not."""
    op = run.graph.sole_consumer(norm.output)
    if op is None or op.kind not in LINEAR_KINDS:
        return "no single linear op after it"
    if op.kind is OpKind.CONV_TRANSPOSE:
        return f"{op.id!r} is transposed"
    if isinstance(op.attrs, ConvAttrs) and (op.attrs.groups != 1 or any(map(any, op.attrs.pads))):
        return f"{op.id!r} has padding or groups"
    if op.weight is None:
        return f"{op.id!r} has no weight"
    shape = run.graph.params[op.weight].shape
    if reason := _unfit(run, op, norm, norm.output, input_channels(op, shape)):
        return reason
    scale, shift = _scale_shift(run, norm)
    weight, bias = run.weight(op), run.bias(op)
    over = (slice(None), *(None for _ in shape[2:]))
    run.biases[op.id] = bias + weight.reshape(*shape[:2], -1).sum(axis=2) @ shift
    run.weights[op.id] = weight * scale[over]
    run.edits.append(edits.FoldBatchNorm(norm.id, op.id))
    run.note(norm, op.id, "forward")
    return ""


def _rewrite(run: Folding, norm: Op) -> bool:
    """Make the norm y = s·x + t; False where its parameters aren't its own or the numbers don't allow it."""
    roles = (ParamRole.GAMMA, ParamRole.BETA, ParamRole.MEAN, ParamRole.VAR)
    owned = all(r in norm.params and run.graph.users(norm.params[r]) == (norm,) for r in roles)
    distinct = len({norm.params.get(r) for r in roles}) == len(roles)
    scale, shift = _scale_shift(run, norm)
    if not (owned and distinct and np.isfinite(scale).all() and np.isfinite(shift).all()):
        return False
    frozen = (run.ctx.encodings.get(norm.params[r]) for r in roles)
    if any(e is not None and e.frozen for e in frozen):
        return False
    assert isinstance(norm.attrs, BatchNormAttrs)
    # epsilon stays the op's attribute: var + epsilon = 1.
    var = np.full(scale.size, 1.0 - norm.attrs.epsilon)
    values = (scale, shift, np.zeros(scale.size), var)
    new = {norm.params[r]: v.astype(np.float32) for r, v in zip(roles, values, strict=True)}
    run.params |= new
    return True
