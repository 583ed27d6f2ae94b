"""The kits' small reference models as ONNX users would hold them."""

from __future__ import annotations

from typing import Any

from bitwright.testing.ports import ModelPort
from bitwright.testing.reference import ReferenceModel
from bitwright_onnx.adapters import write_graph


def onnx_model(model: ReferenceModel) -> Any:
    """A reference model as a `ModelProto`, of integer inputs and lookups too."""
    return write_graph(model.graph, model.params)


def model_port() -> ModelPort:
    """See `bitwright.testing.ports`."""
    return ModelPort(onnx_model)
