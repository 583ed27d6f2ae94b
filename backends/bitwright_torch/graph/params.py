"""Parameter values in and out of a captured model, in canonical layout."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bitwright.backend import checked_param, known_param
from bitwright.errors import ModelError
from bitwright.graph import Param, ParamId
from bitwright_torch.graph.canonical import canonical
from bitwright_torch.graph.model import CapturedModel, replace_tensors, tensor_of
from bitwright_torch.graph.operands import Operand

Known = Mapping[ParamId, tuple[Operand, Param]]


def read_params(model: CapturedModel, ids: Collection[ParamId]) -> dict[ParamId, NDArray[np.float32]]:
    """Values in canonical layout, float32.

    Raises:
        ModelError: an id names no float parameter.
    """
    known = canonical(model).params
    values: dict[ParamId, NDArray[np.float32]] = {}
    for id in ids:
        operand, param = known_param(known, id)
        stored = operand.view(model).to("cpu", torch.float32)
        layout = param.layout or tuple(range(stored.ndim))
        values[id] = np.array(stored.permute(layout).numpy(), np.float32, order="C")
    return values


def write_params(
    model: nn.Module, known: Known, values: Mapping[ParamId, NDArray[np.floating]], owned: set[str]
) -> None:
    """Set values given in canonical layout, in place; stored in the parameter's own dtype, layout and device.

    Args:
        model: a model that shares memory with others.
        known: its parameters.
        values: by parameter.
        owned: names of tensors that are this model's own; those that are written become so.

    Raises:
        ModelError: an id names no float parameter, a shape differs, or a value isn't finite. Nothing is set then.
    """
    native = native_values(known, values)
    for id in native:
        operand, _ = known_param(known, id)
        if operand.evaluator is not None:
            raise ModelError(f"{id!r} is computed from other parameters; it must be made a parameter before it is set")
    own(model, [known_param(known, id)[0].base for id in native], owned)
    for id, value in native.items():
        operand, _ = known_param(known, id)
        with torch.no_grad():
            operand.view(model).copy_(torch.from_numpy(value))


def native_values(known: Known, values: Mapping[ParamId, NDArray[np.floating]]) -> dict[ParamId, NDArray[np.floating]]:
    """Values given in canonical layout, as the parameters are stored.

    Raises:
        ModelError: an id names no float parameter, a shape differs, or a value isn't finite.
    """
    native: dict[ParamId, NDArray[np.floating]] = {}
    for id, value in values.items():
        _, param = known_param(known, id)
        array = checked_param(id, value, param.shape)
        layout = param.layout or tuple(range(array.ndim))
        native[id] = np.array(np.transpose(array, np.argsort(layout)), order="C")  # scalars stay scalars
    return native


def own(model: nn.Module, names: Iterable[str], owned: set[str]) -> None:
    """Give the model memory of its own for tensors that it shares with other models."""
    shared = dict.fromkeys(n for n in names if n not in owned)
    if shared:
        replace_tensors(model, {n: tensor_of(model, n).detach().clone() for n in shared})
        owned.update(shared)
