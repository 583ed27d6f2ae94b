"""The function of an op that was captured: the framework's calls that compute it, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitwright.dataflow._nodes import Step, ValueId
from bitwright.graph import ParamRole

Array = Any
"""An array of the framework."""


@dataclass(frozen=True, eq=False)
class Captured:
    """A `Function`.

    Attributes:
        steps: in order.
        inputs: the op's, in order.
        roles: what parameters are to the steps; those that aren't here are no business of theirs.
        outputs: the op's.
        constants: operands that are neither, by name.
    """

    steps: tuple[Step, ...]
    inputs: tuple[ValueId, ...]
    roles: Mapping[ParamRole, ValueId]
    outputs: tuple[ValueId, ...]
    constants: Mapping[ValueId, Any]

    def __call__(self, inputs: Sequence[Array], params: Mapping[ParamRole, Array]) -> Sequence[Array]:
        """Take all steps."""
        held = {**self.constants, **dict(zip(self.inputs, inputs, strict=True))}
        held |= {value: params[role] for role, value in self.roles.items()}
        for step in self.steps:
            held.update(zip(step.outputs, step.function(*(held[o] for o in step.operands)), strict=True))
        return [held[o] for o in self.outputs]
