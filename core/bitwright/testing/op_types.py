"""Which canonical types ops of each kind may have: targets are keyed by types, so a wrong one gives another plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from bitwright.graph import KINDS, ONNX_TYPES, VENDOR_TYPES, Op, OpKind

K = OpKind
_BESIDES: Mapping[OpKind, tuple[str, ...]] = {
    K.LINEAR: ("MatMul",),  # by a constant matrix
    K.MATMUL: ("Gemm", "Conv", "ConvTranspose"),  # of two activations
    K.EMBEDDING: ("Gather",),
    K.RELU: ("Clip",),  # from 0 upwards
    K.CLIPPED_RELU: ("Clip",),
    K.IDENTITY: ("Cast",),
    K.RESHAPE: ("SpaceToBatch", "BatchToSpace", "ChannelShuffle"),
}
"""By operands or attributes, which an operator's name doesn't tell, or outside ONNX."""
_OPEN = frozenset({K.ACTIVATION, K.ELEMENTWISE})
"""Kinds that hold whatever function is left."""

TYPES: Mapping[OpKind, frozenset[str]] = {
    kind: frozenset((*(t for t, k in KINDS.items() if k is kind), *_BESIDES.get(kind, ())))
    for kind in OpKind
    if kind not in _OPEN and kind is not K.OPAQUE
}
"""By kind. Activations and elementwise ops may have any type that belongs to no other kind; opaque ops any at all."""

_TAKEN = frozenset(KINDS) - {t for t, k in KINDS.items() if k in _OPEN} - {"Cast"}


def wrong_type(op: Op, others: Collection[str] = ()) -> str | None:
    """What is wrong with an op's type, in words; None if nothing is.

    Args:
        op: of a graph.
        others: types outside ONNX that a backend may show for ops that ONNX hasn't got.
    """
    if op.kind is K.OPAQUE:
        return None
    if op.kind in TYPES:
        known = TYPES[op.kind]
        return None if op.type in known else f"a {op.kind} op has type {', '.join(sorted(known))}, not {op.type!r}"
    if op.type in _TAKEN:
        return f"{op.type} is of kind {KINDS[op.type]}, not {op.kind}"
    if op.type in ONNX_TYPES or op.type in VENDOR_TYPES or op.type in others:
        return None
    return f"{op.type!r} is no operator of ONNX; what ONNX hasn't got is declared in `other_types`"
