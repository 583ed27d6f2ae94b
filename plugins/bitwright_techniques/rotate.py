"""Rotate residual streams: an orthogonal change of basis, merged into weights, that spreads outliers over all channels.

R1 of QuaRot (Ashkboos et al. 2024, *QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs*) and SpinQuant (Liu et al.
2024): a norm's γ and β move into the weights that read it, then with x' = x Q what writes to the stream becomes
W' = Qᵀ W, b' = b Q (rows of embeddings e' = e Q), and what reads it W' = W Q. RMS normalization commutes with every
rotation. Layer normalization does with those that keep the mean, Q·1 = 1, which are taken where one reads the stream.

R2 (`heads`): values of attention in another basis, head by head. Attention mixes them over tokens alone, so that with
v' = v Q what makes a head's values becomes W' = Qᵀ W, b' = b Q, and what reads it behind the attention W' = W Q.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Capability
from bitwright.graph import Edit, Graph, Op, OpId, OpKind, ParamId, ParamRole, SetParams, SplitSharedParam
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, Outcome, Report
from bitwright.technique import Settings as BaseSettings
from bitwright_techniques.bias_edits import bias_changes
from bitwright_techniques.orthogonal import Matrix, rotation
from bitwright_techniques.residual_streams import Stream, residual_streams
from bitwright_techniques.value_heads import ValueHeads, value_heads

Values = NDArray[np.float64]


class RotateSettings(BaseSettings):
    """Settings of `Rotate`.

    Attributes:
        kind: "hadamard" with random signs, where there is a Hadamard matrix of that order and no layer normalization
            reads the stream, "random" rotations otherwise and always.
        heads: the values of attention are rotated too, within each head (R2).
    """

    kind: Literal["hadamard", "random"] = "hadamard"
    heads: bool = False


class Rotate:
    """Changes the basis of residual streams; the float function stays the same."""

    name: ClassVar[str] = "rotate"
    Settings: ClassVar[type[BaseSettings]] = RotateSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: RotateSettings) -> Iterable[Request]:
        """None: weights are all that it needs."""
        return ()

    def apply(self, ctx: Context[RotateSettings]) -> Outcome:
        """Rotate every stream that can be; the others are listed with the reason."""
        work = _Rotated(ctx)
        rows: list[tuple[object, ...]] = []
        done = 0
        for stream in residual_streams(ctx.graph):
            reason = stream.obstacle or work.obstacle(stream)
            if not reason:
                work.rotate(stream)
                done += 1
            writers = len(stream.writers) + len(stream.constants)
            readers = len(stream.readers) + sum(len(n.readers) for n in stream.norms.values())
            rows.append((stream.name, stream.width, writers, readers, reason or "rotated"))
        summary = f"rotated {done} of {len(rows)} residual streams"
        if not rows:
            summary = "found no residual stream: no norm reads a sum"
        figures = {"rotated": float(done), "streams": float(len(rows))}
        if ctx.settings.heads:
            values = list(work.rotate_heads())
            figures |= {"values": float(len(values)), "values_rotated": float(sum(v[4] == "rotated" for v in values))}
            summary += f" and the values of {figures['values_rotated']:.0f} of {len(values)} attentions"
            rows += values
        if left := [f"{r[0]}: {r[4]}" for r in rows if r[4] != "rotated"]:
            summary += f"; {left[0]}"
        columns = ("stream", "width", "writers", "readers", "outcome")
        return work.outcome(Report(summary, figures, columns, tuple(rows)))


class _Rotated:
    """Parameters as they change: one value for each use, so that shared ones can part."""

    def __init__(self, ctx: Context[Any]) -> None:
        self.ctx, self.graph = ctx, ctx.graph
        self.values: dict[tuple[OpId, ParamRole], Values] = {}
        self.biases: dict[OpId, Values] = {}
        self.split = 0

    def obstacle(self, stream: Stream) -> str:
        """What of a stream's parameters can't be changed, in words; "" if all can."""
        uses: list[tuple[Op, ParamRole]] = [
            *((op, ParamRole.WEIGHT) for op in (*stream.writers.values(), *stream.readers.values())),
            *((op, ParamRole.BIAS) for op in stream.writers.values() if ParamRole.BIAS in op.params),
            *((op, ParamRole.CONSTANT) for op in stream.constants.values()),
        ]
        for norm in stream.norms.values():
            uses += [(op, ParamRole.WEIGHT) for op in norm.readers]
            for affine in (norm.gain, norm.shift):
                if affine is None:
                    continue
                uses.append(affine)
                if len(self.graph.users(affine[0].params[affine[1]])) > 1:
                    return f"{affine[0].params[affine[1]]!r} is shared by several norms"
        return self._held(uses)

    def _held(self, uses: Iterable[tuple[Op, ParamRole]]) -> str:
        for op, role in uses:
            param = op.params[role]
            encoding = self.ctx.encodings.get(self.ctx.plan.root(param) if param in self.ctx.plan else param)
            if encoding is not None and encoding.frozen:
                return f"the encoding of {param!r} is frozen ({encoding.held_by or encoding.source or 'loaded'})"
            if op.id in self.ctx.folded:
                return f"{op.id!r} has absorbed a batch norm"
        return ""

    def rotate(self, stream: Stream) -> None:
        """Fold the norms' γ and β, and merge a rotation."""
        for norm in stream.norms.values():
            for op in norm.readers:
                weight = self._now(op, ParamRole.WEIGHT)
                if norm.shift is not None and (shift := self._now(*norm.shift)).any():
                    self.biases[op.id] = self._bias(op) + weight @ np.broadcast_to(shift.reshape(-1), stream.width)
                if norm.gain is not None:
                    self.values[op.id, ParamRole.WEIGHT] = weight * self._now(*norm.gain).reshape(1, -1)
        for norm in stream.norms.values():
            for affine, neutral in ((norm.gain, np.ones_like), (norm.shift, np.zeros_like)):
                if affine is not None:
                    self.values[affine[0].id, affine[1]] = neutral(self._now(*affine))
        centred = any(n.centred for n in stream.norms.values())
        random = self.ctx.settings.kind == "random"
        q: Matrix = rotation(stream.width, self.ctx.rng(f"rotate/{stream.name}"), random=random, keeps_mean=centred)
        for op in stream.writers.values():
            weight = self._now(op, ParamRole.WEIGHT)
            self.values[op.id, ParamRole.WEIGHT] = weight @ q if op.kind is OpKind.EMBEDDING else q.T @ weight
            if ParamRole.BIAS in op.params or op.id in self.biases:
                self.biases[op.id] = self._bias(op) @ q
        for op in stream.constants.values():
            self.values[op.id, ParamRole.CONSTANT] = self._now(op, ParamRole.CONSTANT) @ q
        read = {op.id: op for norm in stream.norms.values() for op in norm.readers} | stream.readers
        for op in read.values():
            self.values[op.id, ParamRole.WEIGHT] = self._now(op, ParamRole.WEIGHT) @ q

    def rotate_heads(self) -> Iterator[tuple[object, ...]]:
        """Rotate the values of each attention, where they can be; a row of the report for each."""
        for name, found in value_heads(self.graph):
            if isinstance(found, str):
                yield f"values of {name}", 0, 0, 0, found
                continue
            uses = [(op, ParamRole.WEIGHT) for op in (found.writer, found.reader)]
            uses += [(found.writer, ParamRole.BIAS)] * (ParamRole.BIAS in found.writer.params)
            uses += [(op, ParamRole.CONSTANT) for op in found.constants]
            reason = self._held(uses)
            if not reason:
                self._rotate_values(found)
            heads, width = found.channels.shape
            yield f"values of {name}", width, heads, len(found.features), reason or "rotated"

    def _rotate_values(self, values: ValueHeads) -> None:
        writer, reader, channels = values.writer, values.reader, values.channels
        rng, random = self.ctx.rng(f"rotate/values/{writer.id}"), self.ctx.settings.kind == "random"
        turns = [rotation(channels.shape[1], rng, random=random, keeps_mean=False) for _ in channels]
        weight, bias = self._now(writer, ParamRole.WEIGHT).copy(), None
        if ParamRole.BIAS in writer.params or writer.id in self.biases:
            bias = self._bias(writer).copy()
        constants = {op.id: (op, self._now(op, ParamRole.CONSTANT).copy()) for op in values.constants}
        for own, q in zip(channels, turns, strict=True):
            weight[own] = q.T @ weight[own]
            if bias is not None:
                bias[own] = bias[own] @ q
            for _, constant in constants.values():
                constant[..., own] = constant[..., own] @ q
        self.values[writer.id, ParamRole.WEIGHT] = weight
        if bias is not None:
            self.biases[writer.id] = bias
        self.values |= {(op.id, ParamRole.CONSTANT): constant for op, constant in constants.values()}
        read = self._now(reader, ParamRole.WEIGHT).copy()
        for own, head in zip(values.features, values.head_of, strict=True):
            read[:, own] = read[:, own] @ turns[head]
        self.values[reader.id, ParamRole.WEIGHT] = read

    def _now(self, op: Op, role: ParamRole) -> Values:
        known = self.values.get((op.id, role))
        return np.asarray(self.ctx.params[op.params[role]], np.float64) if known is None else known

    def _bias(self, op: Op) -> Values:
        if op.id in self.biases:
            return self.biases[op.id]
        if ParamRole.BIAS in op.params:
            return np.asarray(self.ctx.params[op.params[ParamRole.BIAS]], np.float64)
        assert op.weight is not None
        return np.zeros(self.graph.params[op.weight].shape[0])

    def outcome(self, report: Report) -> Outcome:
        """All changes. A shared parameter is written once for each use that parts from it, and copied at once."""
        params, later = bias_changes(self.graph, {op: b.astype(np.float32) for op, b in self.biases.items()})
        by_param: dict[ParamId, list[tuple[OpId, Values | None]]] = {}
        for (op, role), value in self.values.items():
            by_param.setdefault(self.graph.op(op).params[role], []).append((op, value))
        edits: list[Edit] = []
        for param, uses in by_param.items():
            untouched = [op for op in self.graph.users(param) if op.id not in {u for u, _ in uses}]
            first, *others = uses if not untouched else [(untouched[0].id, None), *uses]
            own = np.asarray(self.ctx.params[param], np.float64) if first[1] is None else first[1]
            for user, wanted in others:
                if wanted is not None and not np.array_equal(wanted, own):
                    edits += [SetParams({param: wanted.astype(np.float32)}), SplitSharedParam(user, param)]
                    self.split += 1
            params[param] = own.astype(np.float32)
        if self.split:
            report = Report(
                f"{report.summary}; {self.split} uses of shared matrices have a copy of their own now",
                {**report.figures, "split": float(self.split)},
                report.columns,
                report.rows,
            )
        return Outcome(params, {}, [*edits, *later], {}, report)
