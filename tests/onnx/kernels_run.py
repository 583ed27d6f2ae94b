"""Which kernels ONNX Runtime runs for a model, to see what stays in float."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort

from bitwright_onnx.export.runtime import INTEGER_CONFIG
from bitwright_onnx.simulate.session import session_options

INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QAttention", "QMoE", "DynamicQuantize", "QOrdered")
PLUMBING = frozenset(
    [
        "QuantizeLinear",
        "DequantizeLinear",
        "Reshape",
        "Transpose",
        "Shape",
        "Squeeze",
        "Unsqueeze",
        "Gather",
        "Slice",
        "Concat",
        "Split",
        "Flatten",
        "Identity",
        "Range",
        "Cast",
        "Constant",
        "Expand",
        "Pad",
        "MaxPool",
    ]
)


@dataclass(frozen=True)
class RuntimeOps:
    """Operators that are run, all optimizations done, and those that still compute in float."""

    counts: Counter[str]
    floating: Counter[str]


def runtime_ops(path):
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(INTEGER_CONFIG)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = list(ir.from_proto(onnx.load(options.optimized_model_filepath, load_external_data=False)).graph)
    floating = [n.op_type for n in nodes if n.op_type not in PLUMBING and computes_in_float(n)]
    return RuntimeOps(Counter(n.op_type for n in nodes), Counter(floating))


def computes_in_float(node):
    if node.op_type.startswith(INTEGER):
        return False
    types = [v.dtype for v in (*node.inputs, *node.outputs) if v is not None and v.dtype is not None]
    return not types or any(t.is_floating_point() for t in types)
