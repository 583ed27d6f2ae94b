"""Exceptions of Hexagon generations, applied after the configuration's sections (AIMET's hardware rules)."""

from __future__ import annotations

from bitwright.graph import Op, OpKind, ParamId, ParamRole
from bitwright.grids import QuantSpec
from bitwright.placement._activations import ActivationPlacement
from bitwright.placement._plan import Decision, SharedWith, SiteId

Decisions = dict[SiteId, Decision]


def apply_exceptions(placement: ActivationPlacement, decisions: Decisions, notes: list[str]) -> None:
    """Change specifications in place, as the target's `hw_version` demands; nothing without one.

    - V66 to V69: the second operand of a product of two activations is symmetric and has 8 bits.
    - From V73: a 16-bit second operand is symmetric, and the first has 16 bits too; weights of embeddings and group
      normalizations take the width of activations there.
    - Layer normalization: the weight is symmetric only with 16 bits. RMS and instance normalization: the weight is
      symmetric as the output is.
    """
    version = placement.target.hw_version
    if version is None:
        return
    for op in placement.graph:
        if op.kind is OpKind.MATMUL and len(op.data_inputs) == 2:
            _matmul(op, version, decisions, notes)
        role = ParamRole.WEIGHT if op.kind is OpKind.EMBEDDING else ParamRole.GAMMA
        if role in op.params:
            op_type = "Embedding" if op.kind is OpKind.EMBEDDING else op.type
            _norm(op_type, op.params[role], op.output, version, decisions)
    for composite in placement.composites:
        if composite.gamma is not None:
            _norm(
                composite.type, composite.gamma.params[ParamRole.CONSTANT], composite.output.output, version, decisions
            )


def _matmul(op: Op, version: int, decisions: Decisions, notes: list[str]) -> None:
    first, second = (_root(decisions, t) for t in op.data_inputs)
    a, b = decisions[first], decisions[second]
    if not isinstance(b, QuantSpec) or b.float_format is not None:
        return
    if version < 73:
        wanted = b.with_(bits=8, symmetric=True, signed=True)
    elif b.bits == 16:
        wanted = b.with_(symmetric=True, signed=True)
        if isinstance(a, QuantSpec) and a.float_format is None and a.bits != 16 and first != second:
            decisions[first] = a.with_(bits=16)
            notes.append(f"{first}: 16 bits, because the other operand of {op.id!r} has 16 (V{version})")
    else:
        return
    if wanted != b:
        decisions[second] = wanted
        notes.append(f"{second}: symmetric, {wanted.bits} bits, as second operand of {op.id!r} (V{version})")


def _norm(op_type: str, weight: ParamId, output: SiteId, version: int, decisions: Decisions) -> None:
    spec, out = decisions[weight], decisions[_root(decisions, output)]
    if not isinstance(spec, QuantSpec) or spec.float_format is not None:
        return
    if op_type == "LayerNormalization":
        decisions[weight] = _symmetric(spec, spec.bits >= 16)
    if not isinstance(out, QuantSpec) or out.float_format is not None:
        return
    if op_type in ("Embedding", "GroupNormalization") and version >= 73:
        decisions[weight] = spec.with_(bits=out.bits)
    elif op_type in ("RMSNormalization", "InstanceNormalization"):
        decisions[weight] = _symmetric(spec, out.symmetric)


def _symmetric(spec: QuantSpec, on: bool) -> QuantSpec:
    return spec.with_(symmetric=on, strict=spec.strict and on, unsigned_symmetric=spec.unsigned_symmetric and on)


def _root(decisions: Decisions, site: SiteId) -> SiteId:
    while isinstance(decision := decisions[site], SharedWith):
        site = decision.site
    return site
