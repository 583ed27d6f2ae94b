"""How a target treats parameters: weights, constants and biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from bitwright.errors import TargetError
from bitwright.graph import CONSTANT_KINDS, LINEAR_KINDS, ConvAttrs, Graph, Op, OpKind, Param, ParamId, ParamRole
from bitwright.grids import Blockwise, Dynamic, Granularity, PerChannel, PerTensor, QuantSpec
from bitwright.placement._activations import MASKED, WEIGHTS_ONLY, ActivationPlacement
from bitwright.placement._plan import Decision, Derived, Float, Fused, OwnForms, SharedWith, SiteId
from bitwright.placement._types import Precision, activation_spec, param_spec

SpecOf = Callable[[SiteId], QuantSpec | None]


@dataclass(frozen=True)
class _Verdict:
    """A decision for one use of a parameter; `policy` if the target's settings made it, and not the op's nature."""

    op: Op
    decision: Decision
    policy: bool = False


class ParameterPlacement:
    """Decides parameters, given the activations.

    Args:
        activations: the finished placement of activations.
        spec_of: specification in force at an activation, ties followed; None in float.
        weights: precision of weights; None leaves parameters in float.
        constants: precision of activations, for constants; None if they stay in float.
        notes: takes what the user should know of fallbacks.

    Attributes:
        unblocked: weights with at least a block's inputs that can't be divided into blocks as was asked, by reason.
    """

    def __init__(
        self,
        activations: ActivationPlacement,
        spec_of: SpecOf,
        weights: Precision | None,
        constants: Precision | None,
        notes: list[str],
    ) -> None:
        self.activations, self.spec_of = activations, spec_of
        self.graph, self.target = activations.graph, activations.target
        self.overrides = activations.overrides
        self.weights, self.constants, self.notes = weights, constants, notes
        self.unblocked: dict[ParamId, str] = {}
        self._lookups = activations.lookups
        self._inside = {op.id: c for c in activations.composites for op in c.ops}

    def decide(self, param: ParamId) -> Decision:
        """The decision for a parameter that isn't the bias of a linear op.

        Raises:
            TargetError: two ops share it and the target treats them differently.
        """
        verdicts = [
            self._use(op, role, self.graph.params[param])
            for op in self.graph.users(param)
            for role, p in op.params.items()
            if p == param
        ]
        return self._agreed(param, verdicts)

    def is_linear_bias(self, param: ParamId) -> bool:
        """Whether every user adds it to a matrix product."""
        users = self.graph.users(param)
        return all(op.kind in LINEAR_KINDS and op.params.get(ParamRole.BIAS) == param for op in users)

    def bias(self, param: ParamId, spec_of: SpecOf, root_of: Callable[[SiteId], SiteId]) -> Decision:
        """The decision for a linear op's bias: int32 derived from input and weight where both are integers.

        Args:
            param: the bias.
            spec_of: as above, parameters included.
            root_of: end of a site's ties.
        """
        users = self.graph.users(param)
        precision = self.overrides.sites.get(param, self.weights)
        if precision is None:
            return self._kept(param)
        for op in users:
            if (reason := self.activations.floats(op)) is not None:
                return Float(reason)
        op = users[0]
        named = self.target.says_quantized(self.target.type_of(op), ParamRole.BIAS)
        if self.target.config.bitwright.integer_bias:
            sources = {(root_of(u.data_inputs[0]), u.params[ParamRole.WEIGHT]) for u in users}
            reason = next((r for u in users if (r := self._no_integer_bias(u, spec_of)) is not None), None)
            if reason is None and len(sources) == 1:
                return Derived((op.data_inputs[0], op.params[ParamRole.WEIGHT]))
            if reason is None:
                uses = dict.fromkeys((u.data_inputs[0], u.params[ParamRole.WEIGHT]) for u in users)
                return OwnForms("ops with different scales share it: int32 on the grid of each", tuple(uses))
        else:
            reason = "the target keeps biases in float"
        if named:
            _, symmetric = self.target.param(self.target.type_of(op), ParamRole.BIAS)
            return param_spec(self.target, _vector(precision), symmetric=symmetric, granularity=PerTensor())
        return Float(reason)

    def _no_integer_bias(self, op: Op, spec_of: SpecOf) -> str | None:
        for site, what in ((op.data_inputs[0], "input"), (op.params[ParamRole.WEIGHT], "weight")):
            spec = spec_of(site)
            if spec is None:
                return f"the {what} {site!r} stays in float"
            if spec.float_format is not None:
                return f"the {what} {site!r} is {spec.float_format}"
            if isinstance(spec.granularity, Dynamic):
                return f"the range of the {what} {site!r} is found at run time"
            if isinstance(spec.granularity, Blockwise) and spec.granularity.decompressed_bits is None:
                return "blockwise weights have no one scale for each output"
        return None

    def _use(self, op: Op, role: ParamRole, param: Param) -> _Verdict:
        override = self.overrides.sites.get(param.id, self.weights)
        if override is None:
            return _Verdict(op, self._kept(param.id))
        if not param.dtype.startswith(("float", "bfloat")):
            return _Verdict(op, Float(f"{param.dtype} values are never quantized"))
        if (reason := self.activations.floats(op)) is not None:
            return _Verdict(op, Float(reason))
        if op.kind is OpKind.EMBEDDING and self.graph.tensors[op.output].mask:
            return _Verdict(op, Float(MASKED))  # rows of a table of masks, looked up by position
        if op.id in self.activations.folds:
            into = self.activations.folds[op.id].into
            assert into.weight is not None  # what a batch norm folds into has one
            return _Verdict(op, Fused(f"folds into {into.id!r}", into.weight))
        if self.activations.floating and param.id not in self.overrides.sites and not _is_matrix(op, role):
            return _Verdict(op, Float(f"{WEIGHTS_ONLY}, and with them all parameters but matrices"))
        op_type = self.target.type_of(op)
        if role is ParamRole.CONSTANT:
            composite = self._inside.get(op.id)
            if composite is None:
                return _Verdict(op, self._constant(op, param))
            if composite.gamma is None or composite.gamma.id != op.id:
                return _Verdict(op, Fused(f"inside {composite.type}", composite.output.output))
            if not self.target.runs(composite.type):
                return _Verdict(op, Float(f"the target runs {composite.type} in float"))
            op_type, role = composite.type, ParamRole.GAMMA
        quantized, symmetric = self.target.param(op_type, role)
        if role in (ParamRole.MEAN, ParamRole.VAR):
            quantized = self.target.says_quantized(op_type, role)
        if not quantized:
            return _Verdict(op, Float(f"the target doesn't quantize this {role.value}"), policy=True)
        matrix = role is ParamRole.WEIGHT and op.kind in LINEAR_KINDS
        precision = override if matrix or param.id in self.overrides.sites else _vector(override)
        layout = self._granularity(op, op_type, role, param, precision)
        return _Verdict(op, param_spec(self.target, precision, symmetric=symmetric, granularity=layout), policy=True)

    def _kept(self, param: ParamId) -> Float:
        asked = param in self.overrides.sites
        return Float("kept in float by an override" if asked else "parameters stay in float, as was asked")

    def _common(self, first: _Verdict, other: _Verdict) -> QuantSpec | None:
        """The best grid that two users of one parameter can both take: the more bits, and a scale for each channel
        where one of them looks rows up (whose scale goes with the row); None where more than that differs."""
        a, b = first.decision, other.decision
        if not (isinstance(a, QuantSpec) and isinstance(b, QuantSpec)):
            return None
        wider = a if a.bits >= b.bits else b
        if a.bits == b.bits and a.with_(granularity=b.granularity, scale_type=b.scale_type) != b:
            return None
        if a.granularity != b.granularity and wider.float_format is not None:
            wider = wider.with_(scale_type=None)  # that of blocks, which it won't have
        rows = [v for v in (first, other) if v.op.kind is OpKind.EMBEDDING and v.op.output not in self._lookups]
        rest = [v for v in (first, other) if v not in rows]
        if (
            len(rest) == 1
            and rest[0].op.kind is OpKind.LINEAR
            and self.target.per_channel(self.target.type_of(rest[0].op))
        ):
            return wider.with_(granularity=PerChannel(0))
        return wider if a.granularity == b.granularity else wider.with_(granularity=PerTensor())

    def _granularity(self, op: Op, op_type: str, role: ParamRole, param: Param, precision: Precision) -> Granularity:
        if role in (ParamRole.GAMMA, ParamRole.SLOPE):
            wide = len(param.shape) > 0 and param.shape[0] > 1
            return PerChannel(0) if wide and self.target.per_channel(op_type) else PerTensor()
        if role is not ParamRole.WEIGHT or op.kind not in LINEAR_KINDS:
            return PerTensor()
        axis, block_axis = weight_axes(op)
        grouped = op.kind is OpKind.CONV_TRANSPOSE and isinstance(op.attrs, ConvAttrs) and op.attrs.groups > 1
        plain: Granularity = PerTensor() if grouped or not self.target.per_channel(op_type) else PerChannel(axis)
        if precision.blocks is None:
            return plain
        length, size = param.shape[block_axis], precision.blocks.block_size
        if grouped or length % size:
            why = "a grouped transposed convolution" if grouped else f"{length} inputs aren't a multiple of {size}"
            fallback = "per channel" if isinstance(plain, PerChannel) else "per tensor"
            self.notes.append(f"{param.id}: {why}: quantized {fallback} instead of in blocks")
            if length >= size:
                self.unblocked[param.id] = why
            return plain
        return replace(precision.blocks, axis=axis, block_axis=block_axis)

    def _constant(self, op: Op, param: Param) -> Decision:
        """Constants are quantized like activations, where the op computes in integers and rounding is harmless."""
        config = self.target.config
        precision = self.overrides.sites.get(param.id) or self.constants
        if precision is None:
            return Float(WEIGHTS_ONLY)
        if precision.float_format is not None:
            precision = _vector(precision)
        if self.graph.tensors[op.output].mask:
            return Float(MASKED)
        if op.kind not in CONSTANT_KINDS or op.type in ("Pow", "Where"):
            return Float(f"{op.type} needs its constant exactly")
        if op.type == "Div" and prod(param.shape) > 1:
            return Float("a divisor might round to zero")
        asked = bool(config.model_input.is_input_quantized) or bool(self.target.op(op.type).is_input_quantized)
        if not (config.bitwright.quantize_constants and asked):
            return Float("the target doesn't quantize constants")
        if not any(self.spec_of(t) is not None for t in op.data_inputs):
            return Float("the other operand stays in float")
        if op.type in config.bitwright.ties and self.spec_of(op.output) is not None:
            return SharedWith(op.output)
        symmetric = self.target.op(op.type).is_symmetric
        if symmetric is None:
            symmetric = bool(config.defaults.ops.is_symmetric)
        return activation_spec(self.target, precision, symmetric=symmetric)

    def _agreed(self, param: ParamId, verdicts: list[_Verdict]) -> Decision:
        policies = [v for v in verdicts if v.policy] or verdicts
        first = policies[0]
        for other in policies[1:]:
            a, b = first.decision, other.decision
            if a == b:
                continue
            common = self._common(first, other)
            if common is not None:
                first = replace(first, decision=common)
                self.notes.append(
                    f"{param}: {policies[0].op.id!r} ({policies[0].op.type}) and {other.op.id!r} ({other.op.type}) "
                    f"share it, {_describe(a)} and {_describe(b)}; {_describe(common)} for both"
                )
            elif first.policy and other.policy and (isinstance(a, Float) or isinstance(b, Float)):
                # One array is stored once: what one of its readers takes in float is float.
                first = first if isinstance(a, Float) else other
                self.notes.append(
                    f"{param}: {policies[0].op.id!r} ({policies[0].op.type}) and {other.op.id!r} ({other.op.type}) "
                    f"share it, {_describe(a)} and {_describe(b)}; float for both"
                )
            elif first.policy:
                raise TargetError(
                    f"{self.target.source}: ops {first.op.id!r} ({first.op.type}) and {other.op.id!r} "
                    f"({other.op.type}) share parameter {param!r}, and the target treats them differently "
                    f"({_describe(a)} / {_describe(b)}); "
                    "give both op types the same settings, or override the parameter"
                )
        return first.decision


def _is_matrix(op: Op, role: ParamRole) -> bool:
    """Whether a parameter is what quantizing weights only is about: what an op multiplies by, or looks up."""
    kinds = (*LINEAR_KINDS, OpKind.EMBEDDING, OpKind.RECURRENT)
    return role in (ParamRole.WEIGHT, ParamRole.RECURRENT) and op.kind in kinds


def weight_axes(op: Op) -> tuple[int, int]:
    """(channel axis, block axis) of a linear op's weight in canonical layout."""
    return (1, 0) if op.kind is OpKind.CONV_TRANSPOSE else (0, 1)


def _vector(precision: Precision) -> Precision:
    """Of parameters that aren't matrices: below 8 bits they would save nothing and cost much, and they are integers."""
    if precision.float_format is not None and precision.bits < 8:
        return Precision(8, True, explicit=precision.explicit)
    return replace(precision, bits=max(8, precision.bits), blocks=None)


def _describe(decision: Decision) -> str:
    if not isinstance(decision, QuantSpec):
        return "float"
    symmetry = "symmetric" if decision.symmetric else "asymmetric"
    number = decision.float_format or f"{'int' if decision.signed else 'uint'}{decision.bits}"
    match decision.granularity:
        case PerTensor():
            layout = "per tensor"
        case PerChannel():
            layout = "per channel"
        case _:
            layout = "in blocks"
    return f"{number} {symmetry} {layout}"


def linear_biases(graph: Graph, placement: ParameterPlacement) -> frozenset[ParamId]:
    """Biases of linear ops, which are decided after everything else."""
    return frozenset(p for p in graph.params if graph.users(p) and placement.is_linear_bias(p))
