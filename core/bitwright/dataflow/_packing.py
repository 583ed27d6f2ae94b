"""Captured functions as JSON: calls by name, out of a table of the backend's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from bitwright.dataflow._functions import Captured
from bitwright.dataflow._nodes import Step
from bitwright.errors import InputError, ModelError
from bitwright.graph import ParamRole

Calls = Mapping[str, Callable[..., Any]]


def packed(captured: Captured, calls: Calls, op: str) -> dict[str, Any]:
    """A function as JSON.

    Args:
        captured: whose steps are functions of the table, or `partial`s of such with keyword arguments that JSON has.
        calls: the table.
        op: whose function it is, for the message.

    Raises:
        ModelError: a step is another function.
    """
    names = {id(function): name for name, function in calls.items()}
    steps = []
    for step in captured.steps:
        bound = step.function if isinstance(step.function, partial) else partial(step.function)
        if id(bound.func) not in names or bound.args:
            raise ModelError(
                f"{op!r} can't be kept in a file: it calls {getattr(bound.func, '__qualname__', bound.func)}, which is "
                "not in the backend's `calls`; put it there, or override `pack` and `unpack`"
            )
        steps.append([names[id(bound.func)], bound.keywords, step.operands, step.outputs])
    constants = {k: [str(v.dtype), v.tolist()] for k, v in ((k, np.asarray(v)) for k, v in captured.constants.items())}
    roles = {role.value: value for role, value in captured.roles.items()}
    return {"steps": steps, "inputs": captured.inputs, "roles": roles, "outputs": captured.outputs,
            "constants": constants}  # fmt: skip


def unpacked(stored: Any, calls: Calls) -> Captured:
    """The other way.

    Raises:
        InputError: the file calls what the table hasn't got.
    """
    steps = []
    for name, keywords, operands, outputs in stored["steps"]:
        if name not in calls:
            raise InputError(f"the file calls {name!r}, which this version of the backend hasn't got")
        steps.append(Step(partial(calls[name], **keywords), tuple(operands), tuple(outputs)))
    roles = {ParamRole(role): value for role, value in stored["roles"].items()}
    constants = {k: np.asarray(values, dtype) for k, (dtype, values) in stored["constants"].items()}
    return Captured(tuple(steps), tuple(stored["inputs"]), roles, tuple(stored["outputs"]), constants)
