"""What a default ONNX Runtime session makes of a QDQ model on any host, and a model that none gets wrong.

On x64 without VNNI, u8·s8 kernels saturate (`bitwright.bundle`). Here every product of such a model is looked at: a
convolution, Gemm or MatMul of 8-bit activations with an int8 constant. What can saturate is kept as uint8 with all
codes and the zero point 128 higher instead: the values are the same, the u8·u8 kernels add in int32, and they are
slower (EfficientNet-Lite0 on AVX2: a quarter; with VNNI more). int8 activations never meet these kernels on the right:
on x64 ONNX Runtime makes their pairs uint8 before it fuses them (QDQS8ToU8Transformer).

Integer weights of matrix products that have no 8-bit activation beside them (16 bits, float, blocks) become
MatMulNBits, which by default rounds its inputs to 8 bits in blocks; with the session option
`session.qdq_matmulnbits_accuracy_level` "1" it computes in float32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bitwright.backend import Batch, Tap
from bitwright.bundle import PairRisk, PlainRisks, bound
from bitwright.errors import InputError, ModelError, first_line
from bitwright.files import Array
from bitwright_onnx.capture.data_files import read_model
from bitwright_onnx.capture.writing import save_model
from bitwright_onnx.export.qdq import NAMES
from bitwright_onnx.graph.tensors import tensor_array
from bitwright_onnx.simulate.session import inputs_of, session_options

EXACT_OPTION = 'session.x64quantprecision to "1"'
FLOAT_OPTION = 'session.qdq_matmulnbits_accuracy_level to "1"'

_MOVES = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast", "Slice", "Gather"})
"""Ops through which ONNX Runtime may push a pair."""
_EIGHT = (ir.DataType.INT8, ir.DataType.UINT8)


def risks_of(path: str | Path) -> PlainRisks:
    """What a default session may compute otherwise, on some host.

    Raises:
        ModelError: the file can't be read.
    """
    model = _load(path)
    names = {v: k for k, v in json.loads(model.metadata_props.get(NAMES, "{}")).items()}
    risks: dict[str, PairRisk] = {}
    rounded: list[str] = []
    for node in model.graph:
        weight = _weight(node)
        if weight is None:
            continue
        dequantize, between = weight
        name = str(dequantize.outputs[0].name)
        site = names.get(name, name)
        if _rounds_inputs(node):
            rounded.append(site)
        elif "block_size" in dequantize.attributes:
            continue  # blocks have no integer kernel beside 8-bit activations
        elif (channels := _channels(node, dequantize, between)) is not None and channels.any():
            risks[site] = PairRisk(site, str(node.name), int(channels.sum()), len(channels))
    return PlainRisks(tuple(risks.values()), tuple(rounded), EXACT_OPTION, FLOAT_OPTION)


def keep_exact(path: str | Path) -> tuple[str, ...]:
    """Rewrite a QDQ file so that no pair of products can saturate; the weights that were moved to uint8.

    Raises:
        ModelError: the file can't be read.
        InputError: it can't be written.
    """
    moved = [risk.weight for risk in risks_of(path).pairs]
    if not moved:
        return ()
    model = _load(path)
    names = json.loads(model.metadata_props.get(NAMES, "{}"))
    wanted = {names.get(site, site) for site in moved}
    done: set[str] = set()
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and str(node.outputs[0].name) in wanted:
            _move_up(model.graph, node, done)
    save_model(model, path)
    return tuple(moved)


def _move_up(graph: ir.Graph, node: ir.Node, done: set[str]) -> None:
    """Let all pairs of an int8 initializer read uint8 codes, 128 higher."""
    value = node.inputs[0]
    assert value is not None and value.const_value is not None
    if str(value.name) in done:
        return
    done.add(str(value.name))
    value.const_value = _unsigned(value.const_value, str(value.name))
    value.dtype = ir.DataType.UINT8
    for user, _ in list(value.uses()):
        zero = user.inputs[2] if len(user.inputs) > 2 else None
        scale = user.inputs[1]
        assert scale is not None and scale.const_value is not None
        shape = np.shape(scale.const_value.numpy())
        old = np.zeros(shape, np.int8) if zero is None or zero.const_value is None else zero.const_value.numpy()
        name = f"{value.name}_zero_point" if zero is None else str(zero.name)
        while name in graph.initializers and graph.initializers[name] is not zero:
            name += "_2"
        tensor = _unsigned(ir.Tensor(np.asarray(old, np.int8)), name)
        made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor)
        if zero is not None and len(zero.uses()) == 1:
            graph.initializers.pop(name)
        elif zero is not None:
            made.name = tensor.name = f"{name}_of_{user.name}"
        if len(user.inputs) < 3:
            user.resize_inputs(3)
        user.replace_input_with(2, made)
        graph.register_initializer(made)


def _unsigned(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    return ir.Tensor((tensor_array(tensor).astype(np.int16) + 128).astype(np.uint8), name=name)


def _weight(node: ir.Node) -> tuple[ir.Node, list[ir.Node]] | None:
    """The pair that a product's constant right operand comes from, with the ops between; None if there is none."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.inputs) < 2:
        return None
    between: list[ir.Node] = []
    source = _pair(node.inputs[1], between)
    constant = source is not None and source.inputs[0] is not None and source.inputs[0].const_value is not None
    return (source, between) if source is not None and constant else None


def _pair(value: ir.Value | None, between: list[ir.Node]) -> ir.Node | None:
    """The DequantizeLinear that a tensor comes from, through ops that only move values."""
    while value is not None:
        node = value.producer()
        if node is None or node.op_type == "DequantizeLinear":
            return node
        if node.op_type not in _MOVES and node.op_type != "MaxPool":
            return None
        between.append(node)
        value = node.inputs[0]
    return None


def _channels(node: ir.Node, dequantize: ir.Node, between: list[ir.Node]) -> NDArray[np.bool_] | None:
    """Of each output channel, whether a pair of products can saturate; None where the kernel has no such pairs."""
    stored = dequantize.inputs[0]
    assert stored is not None and stored.const_value is not None
    if stored.const_value.dtype is not ir.DataType.INT8:
        return None
    if not _has_8_bits(_pair(node.inputs[0], [])):
        return None
    codes = tensor_array(stored.const_value)
    for step in reversed(between):
        if step.op_type == "Transpose":
            order = step.attributes.get("perm")
            codes = np.transpose(codes, None if order is None else tuple(order.as_ints()))
        elif step.op_type not in ("Identity", "Cast"):
            # How what was moved so is laid out isn't worked out: the two largest codes of a sign might meet.
            return bound(_worst(codes.reshape(1, -1))).channels
    if node.op_type == "Conv":
        group = node.attributes.get("group")
        groups = 1 if group is None else group.as_int()
        if groups > 1 and codes.shape[:2] == (groups, 1):
            return None  # depthwise kernels add in int32
        return bound(codes).channels
    if codes.ndim < 2:
        return bound(codes.reshape(1, -1)).channels
    transposed = node.attributes.get("transB")
    if transposed is None or not transposed.as_int():
        codes = np.swapaxes(codes, -1, -2)
    return bound(codes.reshape(-1, codes.shape[-1])).channels


def _rounds_inputs(node: ir.Node) -> bool:
    """Whether ONNX Runtime makes MatMulNBits of a product with a stored weight: no 8-bit tensor goes in or out."""
    if node.op_type == "Conv" or _has_8_bits(_pair(node.inputs[0], [])):
        return False
    readers = [user for user, _ in node.outputs[0].uses()]
    return not any(user.op_type == "QuantizeLinear" and _has_8_bits(user) for user in readers)


def _has_8_bits(pair: ir.Node | None) -> bool:
    """Whether a pair's codes have 8 bits; without a zero point QuantizeLinear gives uint8."""
    if pair is None:
        return False
    zero = pair.inputs[2] if len(pair.inputs) > 2 else None
    kind = None if zero is None else zero.dtype or (zero.const_value.dtype if zero.const_value is not None else None)
    return kind is None or kind in _EIGHT


def _worst(rows: Array) -> Array:
    """Rows in an order in which the largest two codes are neighbours, and the least two."""
    ordered = np.sort(rows, axis=1)[:, ::-1]
    return np.concatenate([ordered[:, :2], ordered[:, -2:]], axis=1)


class PlainSession:
    """A QDQ file in ONNX Runtime with its default options (`bitwright.backend.Session`): what users get.

    Args:
        path: the file.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._session = ort.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelError(f"ONNX Runtime can't run {str(path)!r}: {first_line(error)}") from error
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._inputs = inputs_of(self._session)

    def run(self, batch: Batch) -> dict[Tap, Array]:
        """The model's outputs.

        Raises:
            InputError: a model input is missing or doesn't fit.
        """
        feeds = {n: i.of(batch) for n, i in self._inputs.items()}
        try:
            values: Sequence[Any] = self._session.run(self._outputs, feeds)
        except Exception as error:
            raise InputError(f"ONNX Runtime refuses the batch: {first_line(error)}") from error
        return {Tap(name): value for name, value in zip(self._outputs, values, strict=True)}


@cache
def saturates_here() -> bool:
    """Whether default sessions saturate on this host: a product of 255 and 127, twice, is asked for."""
    weight = numpy_helper.from_array(np.full((4, 1), 127, np.int8), "w")
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    ends = [helper.make_tensor_value_info("x", TensorProto.UINT8, [2, 4]),
            helper.make_tensor_value_info("y", TensorProto.INT32, [2, 1])]  # fmt: skip
    graph = helper.make_graph([node], "probe", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.full((2, 4), 255, np.uint8)})[0]
    return bool((np.asarray(found) != 4 * 255 * 127).any())


def host_notes() -> tuple[str, ...]:
    """What `bitwright doctor` says of this host."""
    if saturates_here():
        return (
            "ONNX Runtime: uint8 × int8 kernels saturate on this CPU (no VNNI) in default sessions; exports for "
            "onnxruntime-cpu, or with --plain-session, are safe",
        )
    return ("ONNX Runtime: uint8 × int8 kernels are exact on this CPU",)


def _load(path: str | Path) -> ir.Model:
    try:
        return read_model(Path(path))
    except Exception as error:
        raise ModelError(f"can't read {str(path)!r}: {error}") from error
