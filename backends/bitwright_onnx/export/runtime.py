"""The integer runtime: ONNX Runtime on a QDQ model, with all its optimizations, so that pairs become integer kernels.

On x64 without VNNI (most AVX2 hosts) ONNX Runtime's u8·s8 kernels add pairs of products in saturating int16.
EfficientNet-Lite0, 100 images, against the simulation: output SQNR 8.1 dB and 93 % argmax agreement with that,
25.3 dB and 100 % with `session.x64quantprecision`, which moves weights to uint8 and costs 30 % of the time. It is
always on here; a host with VNNI or another architecture is not changed by it.

Matrix products of 16-bit activations with integer weights become MatMulNBits, which by default rounds its input to
8 bits on the fly; `session.qdq_matmulnbits_accuracy_level` 1 makes it compute in float32, as the file says.
Signed activations are moved to uint8 first, without a change of value: ONNX Runtime does so itself on x64 (see
`session.qdqisint8allowed`), but not where a tensor's readers have transposes between, which then run in float
(mini-XCEPTION from Keras: 9 of 23 convolutions).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.backend import Batch, Bundle, Tap, given
from bitwright.errors import InputError, ModelError, first_line
from bitwright.files import Array
from bitwright.graph import TensorId
from bitwright_onnx.capture.data_files import read_model
from bitwright_onnx.export.qdq import NAMES
from bitwright_onnx.graph.subgraph import values_of
from bitwright_onnx.simulate.session import compile_session, inputs_of

INTEGER_CONFIG: Mapping[str, str] = {
    "session.x64quantprecision": "1",
    "session.qdq_matmulnbits_accuracy_level": "1",
}


class IntegerSession:
    """A QDQ model compiled for its outputs and some tensors inside (`bitwright.backend.Session`).

    Args:
        path: a QDQ file, as `write_qdq` writes it.
        taps: sites whose dequantized values are wanted beside the outputs.
        reference: run op by op in float, as the ONNX specification says, with no optimization: what the file means,
            rather than what the integer kernels make of it.

    Raises:
        InputError: there is no such file, or it isn't an ONNX model.
        ModelError: a tap is unknown, or ONNX Runtime refuses the model.
    """

    def __init__(self, path: str | Path, taps: Sequence[TensorId] = (), *, reference: bool = False) -> None:
        model = load_quantized(Path(path))
        names: dict[str, str] = json.loads(model.metadata_props.get(NAMES, "{}"))
        known = values_of(model.graph)
        outputs = [str(v.name) for v in model.graph.outputs]
        self._fetch = {Tap(t): t for t in outputs}
        for tap in taps:
            name = names.get(tap, tap)
            if name not in known:
                raise ModelError(f"the quantized model {str(path)!r} has no tensor {tap!r} to tap")
            self._fetch[Tap(tap)] = name
        inputs = {str(v.name) for v in model.graph.inputs}
        self._passed = {t: n for t, n in self._fetch.items() if n in inputs}
        self._outputs = list(dict.fromkeys(n for n in self._fetch.values() if n not in inputs))
        _unshare_weights(model.graph)
        _move_to_unsigned(model.graph)
        self._session = compile_session(model, self._outputs, config=INTEGER_CONFIG, optimize=not reference)
        self._inputs = inputs_of(self._session)

    @staticmethod
    def tensors(path: str | Path) -> frozenset[str]:
        """What can be tapped in a QDQ file: its tensors, and sites under their own names.

        Raises:
            InputError: there is no such file, or it isn't an ONNX model.
        """
        model = load_quantized(Path(path))
        names: dict[str, str] = json.loads(model.metadata_props.get(NAMES, "{}"))
        return frozenset(values_of(model.graph)) | frozenset(names)

    def run(self, batch: Batch) -> dict[Tap, Array]:
        """The outputs, then the taps.

        Raises:
            InputError: a model input is missing or doesn't fit.
        """
        feeds = {n: i.of(batch) for n, i in self._inputs.items()}
        passed = {t: feeds[n] if n in feeds else given(batch, n) for t, n in self._passed.items()}
        try:
            fetched = self._session.run(self._outputs, feeds)
        except Exception as error:
            raise InputError(f"the integer runtime refuses the batch: {first_line(error)}") from error
        # Asked for nothing, ONNX Runtime hands out all: a model whose outputs are its inputs computes none.
        values: dict[str, Any] = dict(zip(self._outputs, fetched, strict=True)) if self._outputs else {}
        return {tap: passed[tap] if tap in passed else values[name] for tap, name in self._fetch.items()}


def _unshare_weights(graph: ir.Graph) -> None:
    """Give every reader of a quantized weight a copy of its own, in a model that is only going to be run.

    With `session.x64quantprecision`, ONNX Runtime 1.32 moves a weight to uint8 once for each reader, under one name,
    and stops at the second ("Attempt to replace the existing tensor").
    """
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None or not node.inputs[0].is_initializer():
            continue
        for number, (user, index) in enumerate(list(node.outputs[0].uses())[1:], 2):
            operands = [None if v is None else _copied(graph, v, f"{v.name}_reader_{number}") for v in node.inputs]
            output = ir.Value(name=f"{node.outputs[0].name}_reader_{number}")
            output.type, output.shape = node.outputs[0].type, node.outputs[0].shape
            attributes = {key: attribute.value for key, attribute in node.attributes.items()}
            name = f"{node.name}_reader_{number}"
            copy = ir.node("DequantizeLinear", operands, attributes, domain=node.domain, outputs=[output], name=name)
            graph.insert_after(node, copy)
            user.replace_input_with(index, output)


def _move_to_unsigned(graph: ir.Graph) -> None:
    """Let int8 activations be uint8 with all codes 128 higher, in a model that is only going to be run."""
    moved: dict[str, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or len(node.inputs) < 3:
            continue
        x, _, zero = node.inputs
        if x is None or x.is_initializer() or zero is None or zero.dtype is not ir.DataType.INT8:
            continue
        readers = _readers(node.outputs[0])
        if readers is None:
            continue
        for user, index in [(node, 2), *readers]:
            value = user.inputs[index]
            assert value is not None and value.const_value is not None
            key = str(value.name)
            if key not in moved:
                codes = (value.const_value.numpy().astype(np.int16) + 128).astype(np.uint8)
                tensor = ir.Tensor(codes, name=f"{key}_unsigned")
                moved[key] = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), const_value=tensor)
                moved[key].shape = value.shape
                graph.register_initializer(moved[key])
            user.replace_input_with(index, moved[key])
        node.outputs[0].dtype = ir.DataType.UINT8
        for user, _ in readers:
            if user.op_type == "Clip":
                user.outputs[0].dtype = ir.DataType.UINT8


def _readers(codes: ir.Value) -> list[tuple[ir.Node, int]] | None:
    """Where the operands of a tensor's integer readers hold codes: zero points and bounds; None if others read it."""
    found: list[tuple[ir.Node, int]] = []
    for user, _ in codes.uses():
        if user.op_type == "Clip":
            after = _readers(user.outputs[0])
            if after is None:
                return None
            found += [(user, 1), (user, 2), *after]
        elif user.op_type == "DequantizeLinear" and len(user.inputs) > 2 and user.inputs[2] is not None:
            found.append((user, 2))
        else:
            return None
    return found if found and not codes.is_graph_output() else None


def _copied(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """A new initializer with another's values."""
    tensor = value.const_value
    if tensor is None:
        return value
    copy = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
    made = ir.Value(name=name, type=value.type, shape=value.shape, const_value=copy)
    graph.register_initializer(made)
    return made


def compile_bundle(bundle: Bundle, taps: Sequence[TensorId] = (), *, reference: bool = False) -> IntegerSession:
    """Load an exported bundle's quantized model (`bitwright.backend.IntegerRuntime`); see `IntegerSession`.

    Raises:
        InputError: the bundle holds no quantized model.
    """
    path = bundle.files.get("qdq")
    if path is None:
        raise InputError(f"the bundle holds no quantized model ('qdq'), only {', '.join(bundle.files) or 'nothing'}")
    return IntegerSession(path, taps, reference=reference)


def compile_known(bundle: Bundle, taps: Sequence[TensorId]) -> IntegerSession:
    """`compile_bundle` for another backend's bundle; taps that ONNX spells otherwise are left out.

    Raises:
        InputError: as `compile_bundle`.
    """
    known = IntegerSession.tensors(bundle.files["qdq"]) if "qdq" in bundle.files else taps
    return compile_bundle(bundle, [t for t in taps if t in known])


def load_quantized(path: Path) -> ir.Model:
    """Read a QDQ file.

    Raises:
        InputError: there is no such file, or it isn't an ONNX model.
    """
    if not path.is_file():
        raise InputError(f"there is no model file {str(path)!r}")
    try:
        return read_model(path)
    except Exception as error:
        raise InputError(f"{str(path)!r} is not an ONNX model, or it is damaged: {first_line(error)}") from error
