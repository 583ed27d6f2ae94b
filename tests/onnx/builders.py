"""Small ONNX models for tests, built with onnx.helper; weights are drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, INT32, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL


class ModelBuilder:
    """Collects nodes and initializers.

    Args:
        opset: of the default domain.
        seed: of the weights.
        domains: versions of further domains.
    """

    def __init__(self, opset: int = 17, seed: int = 0, **domains: int) -> None:
        self.opset = opset
        self.domains = domains
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[Any] | None, dtype: int = FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, shape: Sequence[Any] | None = None, dtype: int = FLOAT) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def weight(self, name: str, *shape: int, scale: float = 0.5) -> str:
        return self.const(name, (self.rng.standard_normal(shape) * scale).astype(np.float32))

    def positive(self, name: str, *shape: int) -> str:
        return self.const(name, self.rng.uniform(0.5, 1.5, shape).astype(np.float32))

    def const(self, name: str, array: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op: str, inputs: Sequence[str], outputs: str | Sequence[str], name: str | None = None, **attrs: Any):
        outs = [outputs] if isinstance(outputs, str) else list(outputs)
        made = helper.make_node(op, list(inputs), outs, name=outs[0] + "_op" if name is None else name, **attrs)
        self.nodes.append(made)
        return outs[0]

    def batch_norm(self, x: str, y: str, channels: int, name: str | None = None) -> str:
        name = name or y + "_op"
        params = [self.positive(f"{name}.gamma", channels), self.weight(f"{name}.beta", channels),
                  self.weight(f"{name}.mean", channels), self.positive(f"{name}.var", channels)]  # fmt: skip
        return self.node("BatchNormalization", [x, *params], y, name)

    def build(self, *, ir_version: int | None = None, initializers_as_inputs: bool = False) -> onnx.ModelProto:
        inputs = list(self.inputs)
        if initializers_as_inputs:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in self.initializers]
        graph = helper.make_graph(self.nodes, "g", inputs, self.outputs, self.initializers)
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(d.replace("_", "."), v) for d, v in self.domains.items()]
        version = ir_version or helper.find_min_ir_version_for(imports, ignore_unknown=True)
        return helper.make_model(graph, opset_imports=imports, ir_version=version)


def small_cnn(opset: int = 17, seed: int = 0) -> onnx.ModelProto:
    """Conv → BN → ReLU6 → depthwise conv → BN → ReLU → residual add → pool → Gemm → Softmax; x (N, 3, 8, 8)."""
    b = ModelBuilder(opset, seed)
    b.input("x", ["N", 3, 8, 8])
    b.node("Conv", ["x", b.weight("conv1.weight", 8, 3, 3, 3), b.weight("conv1.bias", 8)], "c1", "conv1",
           kernel_shape=[3, 3], pads=[1, 1, 1, 1])  # fmt: skip
    b.batch_norm("c1", "b1", 8, "bn1")
    if opset < 11:
        b.node("Clip", ["b1"], "r1", "relu6", min=0.0, max=6.0)
    else:
        b.node("Clip", ["b1", b.const("zero", np.float32(0)), b.const("six", np.float32(6))], "r1", "relu6")
    b.node("Conv", ["r1", b.weight("dw.weight", 8, 1, 3, 3)], "c2", "dw", kernel_shape=[3, 3], pads=[1, 1, 1, 1],
           group=8)  # fmt: skip
    b.batch_norm("c2", "b2", 8, "bn2")
    b.node("Relu", ["b2"], "r2", "relu2")
    b.node("Add", ["r1", "r2"], "sum", "add")
    b.node("GlobalAveragePool", ["sum"], "gap", "gap")
    b.node("Flatten", ["gap"], "flat", "flatten", axis=1)
    b.node("Gemm", ["flat", b.weight("fc.weight", 5, 8), b.weight("fc.bias", 5)], "logits", "fc", transB=1)
    b.node("Softmax", ["logits"], "prob", "softmax", **({"axis": 1} if opset < 13 else {}))
    b.output("prob", ["N", 5])
    return b.build()


def mlp(opset: int = 17, seed: int = 0, *, bias: bool = True) -> onnx.ModelProto:
    """MatMul (+ Add) → Relu → MatMul; x (N, T, 6)."""
    b = ModelBuilder(opset, seed)
    b.input("x", ["N", "T", 6])
    b.node("MatMul", ["x", b.weight("w1", 6, 10)], "h0", "fc1")
    hidden = b.node("Add", [b.weight("b1", 10), "h0"], "h1", "fc1_bias") if bias else "h0"
    b.node("Relu", [hidden], "h2", "relu")
    b.node("MatMul", ["h2", b.weight("w2", 10, 4)], "y", "fc2")
    b.output("y", ["N", "T", 4])
    return b.build()


def old_style() -> onnx.ModelProto:
    """Opset 9 spellings: Clip, Slice, Pad, Squeeze, Dropout, Split and ReduceSum with attributes, Upsample."""
    b = ModelBuilder(9)
    b.input("x", ["N", 3, 8, 8])
    b.node("Conv", ["x", b.weight("w", 4, 3, 3, 3), b.weight("b", 4)], "c", "conv", kernel_shape=[3, 3],
           pads=[1, 1, 1, 1])  # fmt: skip
    b.node("Clip", ["c"], "r6", "clip", min=0.0, max=6.0)
    b.node("Upsample", ["r6", b.const("scales", np.array([1, 1, 2, 2], np.float32))], "u", "up", mode="nearest")
    b.node("Slice", ["u"], "s", "slice", axes=[2, 3], starts=[0, 0], ends=[4, 4])
    b.node("Pad", ["s"], "p", "pad", pads=[0, 0, 1, 1, 0, 0, 1, 1], mode="constant", value=0.0)
    b.node("Dropout", ["p"], "d", "drop", ratio=0.5)
    b.node("GlobalAveragePool", ["d"], "g", "gap")
    b.node("Squeeze", ["g"], "sq", "squeeze", axes=[2, 3])
    b.node("Unsqueeze", ["sq"], "us", "unsqueeze", axes=[2])
    b.node("ReduceSum", ["us"], "rs", "reduce", axes=[2], keepdims=0)
    b.node("Split", ["rs"], ["s1", "s2"], "split", axis=1, split=[2, 2])
    b.node("Concat", ["s2", "s1"], "cc", "cat", axis=1)
    b.node("Softmax", ["cc"], "y", "softmax", axis=1)
    b.output("y", None)
    return b.build(ir_version=3, initializers_as_inputs=True)


def control_flow() -> onnx.ModelProto:
    """Conv → If (both branches capture the conv's output and a weight) → Relu; inputs x and a flag."""
    b = ModelBuilder(17)
    b.input("x", ["N", 3, 4, 4])
    b.input("flag", [], BOOL)
    b.node("Conv", ["x", b.weight("w", 4, 3, 1, 1)], "c", "conv")
    b.weight("shift", 4, 1, 1)
    branches = {}
    for key, op in (("then_branch", "Add"), ("else_branch", "Mul")):
        out = helper.make_tensor_value_info(f"{op}_out", FLOAT, None)
        inner = helper.make_node(op, ["c", "shift"], [f"{op}_out"], name=f"inner_{op}")
        branches[key] = helper.make_graph([inner], key, [], [out])
    b.node("If", ["flag"], "z", "if", **branches)
    b.node("Relu", ["z"], "y", "relu")
    b.output("y", None)
    return b.build()


def looped() -> onnx.ModelProto:
    """A Loop that adds a captured conv output three times."""
    b = ModelBuilder(17)
    b.input("x", ["N", 3, 4, 4])
    b.node("Conv", ["x", b.weight("w", 3, 3, 1, 1)], "c", "conv")
    body = helper.make_graph(
        [helper.make_node("Add", ["acc", "c"], ["acc2"], name="inner"),
         helper.make_node("Identity", ["cond"], ["cond2"], name="keep")],
        "body",
        [helper.make_tensor_value_info("i", INT64, []), helper.make_tensor_value_info("cond", BOOL, []),
         helper.make_tensor_value_info("acc", FLOAT, None)],
        [helper.make_tensor_value_info("cond2", BOOL, []), helper.make_tensor_value_info("acc2", FLOAT, None)],
    )  # fmt: skip
    b.node("Loop", [b.const("trips", np.int64(3)), b.const("go", np.bool_(True)), "x"], "y", "loop", body=body)
    b.output("y", None)
    return b.build()


def custom_domain() -> onnx.ModelProto:
    """Conv → com.acme.Mystery → Relu: no runtime here knows the middle op."""
    b = ModelBuilder(17, com_acme=1)
    b.input("x", ["N", 3, 4, 4])
    b.node("Conv", ["x", b.weight("w", 4, 3, 1, 1)], "c", "conv")
    b.node("Mystery", ["c"], "m", "mystery", domain="com.acme")
    b.node("Relu", ["m"], "y", "relu")
    b.output("y", None)
    return b.build()


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], outputs: list[str] | None = None) -> list[np.ndarray]:
    """What ONNX Runtime computes from a proto as it stands."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(outputs, feeds)


def image(*shape: int, seed: int = 1) -> np.ndarray:
    """Normal float32 data."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
