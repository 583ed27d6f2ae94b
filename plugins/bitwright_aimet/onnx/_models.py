"""ModelProtos of simulations."""

from __future__ import annotations

from typing import Any

from bitwright.errors import InputError
from bitwright.files import Scratch
from bitwright.simulation import QuantSim


def proto_of(model: Any) -> Any:
    """The `ModelProto` of what AIMET takes: itself, or what holds it as `model`; a path stays a path."""
    return model.model if hasattr(model, "model") and hasattr(model.model, "SerializeToString") else model


def opened(model: Any) -> QuantSim:
    """A simulation that only serves to change the float model."""
    return QuantSim(proto_of(model), target="per_tensor")


def write(model: Any, simulation: QuantSim) -> None:
    """Make a `ModelProto` a simulation's float model, in place.

    Raises:
        InputError: it is a path, or more than 2 GB.
    """
    proto = proto_of(model)
    if not hasattr(proto, "ParseFromString"):
        raise InputError(f"a {type(model).__name__} can't be changed in place; give a ModelProto, or use QuantSim")
    with Scratch() as folder:
        path = simulation.backend.save(simulation.native, folder / "model.onnx")
        if len(list(path.parent.iterdir())) > 1:
            raise InputError("a model of more than 2 GB can't be changed in place; use QuantSim, and export it")
        content = path.read_bytes()
    proto.Clear()
    proto.ParseFromString(content)
