"""The kits' small reference models as ONNX users would hold them."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitwright.graph import ActivationAttrs, AxisAttrs, BatchNormAttrs, ConvAttrs, Op, OpKind, ParamRole, PoolAttrs
from bitwright.testing.ports import ModelPort
from bitwright.testing.reference import ReferenceModel


def _pads(attrs: ConvAttrs) -> list[int]:
    return [p[0] for p in attrs.pads] + [p[1] for p in attrs.pads]


def _window(attrs: ConvAttrs) -> dict[str, Any]:
    return {"kernel_shape": list(attrs.kernel), "strides": list(attrs.strides), "pads": _pads(attrs)}


def _onnx_attributes(op: Op) -> dict[str, Any]:
    match op.attrs:
        case ConvAttrs() as a:
            found = {**_window(a), "dilations": list(a.dilations), "group": a.groups}
            return found | ({"output_padding": list(a.output_padding)} if a.output_padding else {})
        case PoolAttrs(window=ConvAttrs() as w):
            return _window(w)
        case BatchNormAttrs(epsilon=epsilon):
            return {"epsilon": epsilon}
        case AxisAttrs(axis=axis):
            return {"axis": axis}
        case ActivationAttrs(alpha=alpha) if alpha is not None:
            return {"alpha": alpha}
    return {"transB": 1} if op.kind is OpKind.LINEAR and op.type == "Gemm" else {}


_ORDER = (ParamRole.WEIGHT, ParamRole.GAMMA, ParamRole.BIAS, ParamRole.BETA, ParamRole.MEAN, ParamRole.VAR,
          ParamRole.SLOPE, ParamRole.CONSTANT)  # fmt: skip


def onnx_model(model: ReferenceModel) -> Any:
    """A reference model as a `ModelProto`."""
    from onnx import TensorProto, helper, numpy_helper

    graph, nodes = model.graph, []
    constants = {p: np.asarray(v, np.float32) for p, v in model.params.items()}
    for op in graph.ops:
        inputs = [*op.data_inputs, *(op.params[r] for r in _ORDER if r in op.params)]
        if isinstance(op.attrs, ActivationAttrs) and op.type == "Clip":
            for bound, value in (("low", op.attrs.minimum), ("high", op.attrs.maximum)):
                constants[f"{op.id}.{bound}"] = np.asarray(value, np.float32)
                inputs.append(f"{op.id}.{bound}")
        nodes.append(helper.make_node(op.type, inputs, list(op.outputs), name=op.id, **_onnx_attributes(op)))

    def info(t: str) -> Any:
        shape = [n if n is not None else "N" for n in graph.tensors[t].shape or ()]
        return helper.make_tensor_value_info(t, TensorProto.FLOAT, shape)

    whole = helper.make_graph(
        nodes, "reference", [info(t) for t in graph.inputs], [info(t) for t in graph.outputs],
        [numpy_helper.from_array(v, p) for p, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def model_port() -> ModelPort:
    """See `bitwright.testing.ports`."""
    return ModelPort(onnx_model)
