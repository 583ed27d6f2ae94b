"""Which activations a target quantizes: the configuration's sections applied in order, later ones winning.

The order is AIMET's: everything off, `defaults`, `op_type`, `supergroups` and graph passes, `model_input`,
`model_output`; then the user's overrides. One tensor has one quantizer: what an op says of its input is said of the
tensor that it reads, and two ops that contradict each other in `op_type` are an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from bitwright.errors import InputError, TargetError
from bitwright.graph import (
    COMPOSITES,
    INTEGER_TYPES,
    LINEAR_KINDS,
    LINEAR_LAYER,
    BatchNormFold,
    Chain,
    Composite,
    ConvAttrs,
    Graph,
    Match,
    Op,
    OpId,
    OpKind,
    ParamId,
    TensorId,
    batch_norm_fold,
    chain,
    kind,
    op_type,
    preserves_grid,
    where,
)
from bitwright.grids import Dynamic
from bitwright.placement._indices import find_indices
from bitwright.placement._key_values import key_values
from bitwright.placement._overrides import Overrides
from bitwright.placement._types import KeyValueType, Precision
from bitwright.targets import Constraints, Target


@dataclass
class DraftDecision:
    """What the sections so far say of one tensor.

    Attributes:
        on: it has a quantizer.
        reason: why not, in words.
        final: nothing may switch it on again, nor may it take a neighbour's grid.
        symmetric: set by `op_type`; None takes the default.
        limits: the range's constraints.
        precision: set by an override.
        into: of a tensor within what is computed as one op: what that op hands out.
    """

    on: bool = False
    reason: str = "the target quantizes no outputs by default"
    final: bool = False
    symmetric: bool | None = None
    limits: Constraints | None = None
    precision: Precision | None = None
    into: TensorId | None = None

    def off(self, reason: str, *, final: bool = False, into: TensorId | None = None) -> None:
        """Switch off."""
        self.on, self.reason, self.final, self.into = False, reason, final, into


MASKED = "a mask, or masked by one: no grid holds its huge numbers and the others' steps"

WEIGHTS_ONLY = "activations stay in float, as was asked"
NOT_READ = "only what ops with weights read has a range at run time, as was asked; the rest stays in float"

_foldable = where(
    lambda graph, op: (fold := batch_norm_fold(graph, op)) is not None and fold.direction == "backward", "foldable"
)


class ActivationPlacement:
    """Runs the sections over a graph; `drafts` holds the result in topological order.

    Args:
        graph, target: what is placed, and for what.
        overrides: the user's exceptions.
        precision: of activations. None: they stay in float, but for the exceptions; only weights are quantized. With a
            range at run time, only what ops with weights read is quantized.
        key_values: of the keys and values of attention, see `KeyValueType`; None treats them as all activations.

    Raises:
        TargetError: two ops contradict each other in `op_type`.
        InputError: an override asks to quantize integers.
    """

    def __init__(
        self,
        graph: Graph,
        target: Target,
        overrides: Overrides,
        precision: Precision | None,
        key_values: KeyValueType | None = None,
    ) -> None:
        self.graph, self.target, self.overrides = graph, target, overrides
        self.floating = precision is None or precision.dynamic is not None
        """Whether activations stay in float, but for those that are asked for one by one or read by weights."""
        self.config = target.config
        self.notes: list[str] = []
        """What the user should know of what was left in float."""
        self._votes: dict[tuple[TensorId, str], tuple[bool, Op, str]] = {}
        self.folds: dict[OpId, BatchNormFold] = {
            op.id: fold for op in graph if (fold := batch_norm_fold(graph, op)) is not None
        }
        self.composites: list[Composite] = [
            c
            for name in target.passes
            for c in COMPOSITES[name](graph)
            if overrides.float_ops.isdisjoint(op.id for op in c.ops)
        ]
        self.lookups: dict[TensorId, ParamId] = {}
        """Outputs of embeddings that take their table's grid, because the target gives them none."""
        order: list[TensorId] = [*graph.inputs, *(t for op in graph for t in op.outputs)]
        self.drafts: dict[TensorId, DraftDecision] = {t: DraftDecision() for t in order}
        for t in graph.inputs:
            self.drafts[t].reason = "the target doesn't quantize model inputs"
        self._defaults()
        self._op_types()
        self._supergroups()
        self._model_inputs()
        self._model_outputs()
        if self.floating:
            self._weights_only(WEIGHTS_ONLY if precision is None else NOT_READ)
        if precision is not None and precision.dynamic is not None:
            self._read_by_weights(precision)
        if key_values is not None:
            self._key_values(key_values)
        self._indices()
        self._overrides()
        self._integers()

    def floats(self, op: Op) -> str | None:
        """Why an op runs in float; None if it doesn't. A batch norm that folds backward is a part of its linear op."""
        if op.id in self.overrides.float_ops:
            return f"op {op.id!r} is kept in float by an override"
        fold = self.folds.get(op.id)
        if fold is not None and fold.direction == "backward":
            return self.floats(fold.into)
        if op.kind is OpKind.OPAQUE:
            return f"opaque op {op.id!r} ({op.native or op.type}) runs in float"
        if not self.target.runs(self.target.type_of(op)) and not preserves_grid(op):
            return f"the target runs {op.type} in float"
        return None

    def interpolates(self, op: Op) -> bool:
        """Whether the target makes the output of a pooling or resizing share its input's grid. What it computes isn't
        on that grid by itself, so a target that leaves its outputs in float has it computed in float."""
        tied = op.type in self.config.bitwright.ties and op.kind in (OpKind.AVERAGE_POOL, OpKind.RESIZE)
        off = self.target.op(self.target.type_of(op)).is_output_quantized is False
        return tied and not off and self.floats(op) is None and bool(op.data_inputs)

    def follows(self, op: Op) -> bool:
        """Whether an op's outputs have no grid of their own where its input has one."""
        return preserves_grid(op) or self.interpolates(op)

    @cached_property
    def needed(self) -> frozenset[TensorId]:
        """Tensors that a quantized op reads, directly or through ops that follow their input."""
        found: set[TensorId] = set()
        for op in reversed(self.graph.ops):
            if self.follows(op):
                if not found.isdisjoint(op.outputs):
                    found.add(op.data_inputs[0])
            elif self.floats(op) is None:
                found.update(op.data_inputs)
        return frozenset(found)

    def _defaults(self) -> None:
        on = bool(self.config.defaults.ops.is_output_quantized)
        for op in self.graph:
            reason = self.floats(op)
            for t in op.outputs:
                if reason is not None:
                    self.drafts[t].off(reason)
                else:
                    self.drafts[t].on = on

    def _op_types(self) -> None:
        self._told_of_matrices_alone()
        for op in self.graph:
            settings = self.target.said(self.target.type_of(op))
            if settings is None:
                continue
            for t in op.outputs:
                if settings.is_output_quantized is False and op.kind is OpKind.EMBEDDING and op.weight is not None:
                    self.lookups[t] = op.weight
                elif settings.is_output_quantized is not None and not self.follows(op):
                    self._vote(t, "quantized", settings.is_output_quantized, op, "is_output_quantized")
                elif settings.is_output_quantized is False:
                    self.drafts[t].off(f"the target leaves outputs of {op.type} in float")
                if settings.is_symmetric is not None:
                    self._vote(t, "symmetric", settings.is_symmetric, op, "is_symmetric")
                if settings.encoding_constraints is not None:
                    self.drafts[t].limits = settings.encoding_constraints
            if settings.is_input_quantized:
                for t in op.data_inputs:
                    self._vote(t, "quantized", True, op, "is_input_quantized")
                    if settings.is_symmetric is not None:
                        self._vote(t, "symmetric", settings.is_symmetric, op, "is_symmetric")
        for (tensor, what), (value, op, _) in self._votes.items():
            draft = self.drafts[tensor]
            if what == "symmetric":
                draft.symmetric = value
            elif value:
                draft.on = True
            else:
                draft.off(f"the target leaves outputs of {op.type} in float")

    def _told_of_matrices_alone(self) -> None:
        """Note what is said of Gemm and holds for matrices alone. AIMET's PyTorch tools mean every `nn.Linear` by it
        (`map_torch_types_to_onnx` in `aimet_torch.onnx_utils`), its ONNX tools that operator."""
        others = [op.id for op in self.graph if self.target.type_of(op) == LINEAR_LAYER]
        gemm, layer = (self.target.op(t).model_dump(exclude_unset=True) for t in ("Gemm", LINEAR_LAYER))
        if others and (only := [key for key in gemm if key not in layer]):
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            self.notes.append(
                f"op_type Gemm sets {', '.join(only)} for linear layers on matrices, and not for {others[0]!r}{more}, "
                "a MatMul with a weight: name the type Linear to mean both"
            )

    def _vote(self, tensor: TensorId, what: str, value: bool, op: Op, key: str) -> None:
        before = self._votes.setdefault((tensor, what), (value, op, key))
        if before[0] != value:
            _, other, other_key = before
            raise TargetError(
                f"{self.target.source}: op_type settings contradict each other on tensor {tensor!r}: "
                f"{other.type}.{other_key} is {before[0]} for op {other.id!r}, {op.type}.{key} is {value} for op "
                f"{op.id!r}; a tensor has one quantizer, so drop one of the two settings"
            )

    def _supergroups(self) -> None:
        for fold in self.folds.values():
            if fold.direction == "backward" and self._all_run((fold.into, fold.batch_norm)):
                norm = fold.batch_norm
                self.drafts[fold.into.output].off(f"fused with batch norm {norm.id!r}", final=True, into=norm.output)
        layers = {LINEAR_LAYER} - set(self.config.bitwright.extra_op_types)
        for group in self.config.supergroups:
            types = (kind(OpKind.LINEAR) if t in layers else op_type(t) for t in group.op_list)
            pattern: Chain = chain(*types, through=_foldable)
            for match in pattern.find(self.graph):
                if self._fuses(match):
                    for t in match.inner:
                        within = f"inside the supergroup {'+'.join(group.op_list)}"
                        self.drafts[t].off(within, final=True, into=match.output)
        for composite in self.composites:
            for t in composite.inner:
                self.drafts[t].off(f"inside {composite.type}", final=True, into=composite.output.output)

    def _fuses(self, match: Match) -> bool:
        first = match.ops[0].attrs
        volumetric = isinstance(first, ConvAttrs) and len(first.kernel) == 3
        return self._all_run(match.path) and not (volumetric and self.target.hw_version is not None)

    def _all_run(self, ops: Sequence[Op]) -> bool:
        return self.overrides.float_ops.isdisjoint(op.id for op in ops)

    def _model_inputs(self) -> None:
        on = self.config.model_input.is_input_quantized
        if on is None:
            return
        for t in self.graph.inputs:
            draft = self.drafts[t]
            if not on:
                draft.off("the target leaves model inputs in float")
            elif t in self.needed:
                draft.on = True
            elif not draft.on:
                draft.off("no quantized op reads it")
        # As AIMET does, an enabled `model_input` also quantizes what float ops hand to quantized ones.
        for op in self.graph if on else ():
            if self.floats(op) is not None:
                for t in op.outputs:
                    voted_off = not self._votes.get((t, "quantized"), (True,))[0]
                    self.drafts[t].on |= t in self.needed and not voted_off and not self.drafts[t].final

    def _model_outputs(self) -> None:
        on = self.config.model_output.is_output_quantized
        for t in self.graph.outputs if on is not None else ():
            if on:
                self.drafts[t].on = True
            else:
                self.drafts[t].off("the target leaves model outputs in float", final=True)

    def _weights_only(self, reason: str) -> None:
        for draft in self.drafts.values():
            if draft.on:
                draft.off(reason)

    def _read_by_weights(self, precision: Precision) -> None:
        """A range at run time for what ops with weights read.

        Tokens are rows of what a matrix multiplies. What a convolution reads has none: one range serves it all.
        """
        for op in self.graph.linear_ops:
            if op.weight is None or self.floats(op) is not None:
                continue
            site = op.data_inputs[0]
            kinds = {user.kind for user in self.graph.consumers(site)} & LINEAR_KINDS
            rows = precision if kinds == {OpKind.LINEAR} else replace(precision, dynamic=Dynamic(per_token=False))
            self.drafts[site].on, self.drafts[site].precision = True, rows

    def _key_values(self, type: KeyValueType) -> None:
        found = key_values(self.graph)
        if not found:
            raise InputError(
                f"kv_cache={type.text!r}: the model has no attention, which is a softmax between two products of "
                "activations; leave the setting out, or name the tensors in overrides"
            )
        for kept in found:
            precision, told = type.on(kept)
            if told is not None:
                self.notes.append(f"{kept.site}: {told}")
            for t in (kept.site, *(kept.joined if not precision.is_own else ())):
                self.drafts[t].on, self.drafts[t].precision = True, precision

    def _indices(self) -> None:
        found = find_indices(self.graph)
        for t in found.only:
            self.drafts[t].off("only read as indices or conditions, which are exact", final=True)
        for t, (lookup, signal) in found.both.items():
            if self.drafts[t].on or (t in self.needed and not self.floating):
                self.notes.append(
                    f"{t}: {lookup!r} reads it as indices and {signal!r} as a signal; it stays in float, since a grid "
                    "would change the indices"
                )
            self.drafts[t].off("also read as indices, which are exact", final=True)

    def _overrides(self) -> None:
        for site, precision in self.overrides.sites.items():
            if site not in self.drafts:
                continue
            draft = self.drafts[site]
            if precision is None:
                draft.off("kept in float by an override", final=True)
            elif not self.graph.tensors[site].is_float:
                raise InputError(f"overrides: tensor {site!r} holds {self._held(site)} and stays as it is")
            else:
                draft.on, draft.precision = True, precision

    def _held(self, site: TensorId) -> str:
        tensor = self.graph.tensors[site]
        return "masked values" if tensor.mask else tensor.dtype

    def _integers(self) -> None:
        for t, draft in self.drafts.items():
            producer = self.graph.producer(t)
            tensor = self.graph.tensors[t]
            if tensor.mask:
                draft.off(MASKED, final=True)
            elif not tensor.is_float:
                draft.off(f"{tensor.dtype} values are never quantized", final=True)
            elif producer is not None and producer.type in INTEGER_TYPES:
                draft.off(f"outputs of {producer.type} are indices or sizes", final=True)
