"""What a recognizer finds: one canonical op and the nodes that it consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bitwright.graph import Attrs, Call, OpKind, ParamRole, TensorId
from bitwright_tensorflow.graph.network import Read


@dataclass(frozen=True)
class Recognized:
    """One canonical op.

    Attributes:
        id: name of its main node.
        kind, type, attrs: see `bitwright.graph.Op`.
        inputs: data tensors.
        outputs: tensors that it computes.
        reads: parameters by role.
        nodes: every node of it, topologically; constants and sizes left out.
        native: TensorFlow's op type.
        channels: channel axis of tensors, where the op tells it.
        order: permutation of a transposition.
        call: see `bitwright.graph.Op`, where the recognizer says it.
    """

    id: str
    kind: OpKind
    type: str
    inputs: tuple[TensorId, ...]
    outputs: tuple[TensorId, ...]
    reads: Mapping[ParamRole, Read] = field(default_factory=dict)
    attrs: Attrs | None = None
    nodes: tuple[str, ...] = ()
    native: str = ""
    channels: Mapping[TensorId, int] = field(default_factory=dict)
    order: tuple[int, ...] | None = None
    call: Call | None = None

    @property
    def end(self) -> str:
        """The node that computes the first output."""
        return self.nodes[-1]
