"""Small nets of each op kind, for comparing simulation, exact integers, files and the runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Net = tuple[onnx.ModelProto, dict[str, np.ndarray]]
node = helper.make_node
PAD = [1] * 4


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def made(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str]],
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
    types: dict[str, int] | None = None,
    **arrays: Any,
) -> onnx.ModelProto:
    for i, n in enumerate(nodes):
        n.name = n.name or f"{n.op_type.lower()}_{i}"
    kinds = types or {}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(k, kinds.get(k, TensorProto.FLOAT), v) for k, v in inputs.items()],
        [helper.make_tensor_value_info(k, kinds.get(k, TensorProto.FLOAT), None) for k in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()],
    )
    version = 8 if opset < 20 else 10
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=version)
    model = onnx.shape_inference.infer_shapes(model)
    del model.graph.value_info[:]
    return model


def image(*nodes: onnx.NodeProto, c: int = 4, outputs: tuple[str, ...] = ("y",), opset: int = 17, **arrays: Any) -> Net:
    return made(list(nodes), {"x": ["n", c, 8, 8]}, outputs, opset, **arrays), {"x": normal(8, c, 8, 8)}


def rows(*nodes: onnx.NodeProto, shape: tuple[int, ...] = (6, 16), opset: int = 17, **arrays: Any) -> Net:
    return made(list(nodes), {"x": ["n", *shape]}, ("y",), opset, **arrays), {"x": normal(16, *shape)}


CONV = {"w": normal(8, 4, 3, 3, scale=0.3), "b": normal(8, scale=0.5)}
NORM = {
    "ga": 1 + 0.3 * normal(8),
    "be": normal(8, scale=0.3, seed=1),
    "me": normal(8, scale=0.3, seed=2),
    "va": np.linspace(0.5, 2, 8, dtype=np.float32),
}
BIASED = {"w": normal(16, 8), "b": normal(8, scale=0.5)}


def conv(y: str = "c", x: str = "x", w: str = "w", b: str = "b", **attributes: Any) -> onnx.NodeProto:
    return node("Conv", [x, w, b], [y], **{"pads": PAD, **attributes})


def after_conv(op: str, opset: int = 17, extra: tuple[str, ...] = (), **attributes: Any) -> Callable[..., Net]:
    return lambda **arrays: image(conv(), node(op, ["c", *extra], ["y"], **attributes), opset=opset, **CONV, **arrays)


def two_convs(op: str, **attributes: Any) -> Net:
    second = normal(8, 4, 3, 3, scale=0.3, seed=5)
    return image(conv(), conv("d", w="w2"), node(op, ["c", "d"], ["y"], **attributes), w2=second, **CONV)


def embedding() -> Net:
    nodes = [node("Gather", ["table", "ids"], ["e"]), node("MatMul", ["e", "w"], ["y"])]
    ids = np.random.default_rng(0).integers(0, 20, (16, 6))
    net = made(nodes, {"ids": ["n", 6]}, types={"ids": TensorProto.INT64}, table=normal(20, 16), w=normal(16, 8))
    return net, {"ids": ids}


def attention() -> Net:
    nodes = [
        *(node("MatMul", ["x", f"w{k}"], [k]) for k in "qkv"),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"]),
        node("Softmax", ["s"], ["p"], axis=-1),
        node("MatMul", ["p", "v"], ["o"]),
        node("MatMul", ["o", "wo"], ["oo"]),
        node("Add", ["oo", "x"], ["y"]),
    ]
    return rows(*nodes, **{f"w{k}": normal(16, 16, scale=0.3, seed=i) for i, k in enumerate("qkvo")})


def squeeze_excite() -> Net:
    return image(
        conv(),
        node("GlobalAveragePool", ["c"], ["g"]),
        node("Conv", ["g", "wa", "ba"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("Conv", ["r", "wb", "bb"], ["i"]),
        node("Sigmoid", ["i"], ["j"]),
        node("Mul", ["c", "j"], ["y"]),
        wa=normal(4, 8, 1, 1), ba=normal(4), wb=normal(8, 4, 1, 1), bb=normal(8), **CONV,
    )  # fmt: skip


def shared_bias() -> Net:
    square = {"w": normal(4, 4, 3, 3, scale=0.3), "w2": normal(4, 4, 3, 3, scale=0.3, seed=1), "b": normal(4, scale=2)}
    return image(conv("p"), conv("y", "p", "w2"), **square)


def lstm() -> Net:
    nodes = [
        node("LSTM", ["x", "w", "r", "b"], ["h"], hidden_size=8),
        node("Squeeze", ["h", "axis"], ["y"]),
    ]
    arrays = {"w": normal(1, 32, 16, scale=0.3), "r": normal(1, 32, 8, scale=0.3), "b": normal(1, 64, scale=0.1)}
    return made(nodes, {"x": [6, "n", 16]}, axis=ints(1), **arrays), {"x": normal(6, 16, 16)}


NETS: dict[str, Callable[[], Net]] = {
    "conv": lambda: image(conv("y"), **CONV),
    "conv_relu": after_conv("Relu"),
    "conv_clip": lambda: after_conv("Clip", extra=("lo", "hi"))(lo=np.float32(0), hi=np.float32(1.5)),
    "depthwise": lambda: image(conv("y", group=4), w=normal(4, 1, 3, 3), b=normal(4)),
    "grouped": lambda: image(conv("y", group=2), w=normal(8, 2, 3, 3), b=normal(8)),
    "strided": lambda: image(conv("y", strides=[2, 1], dilations=[1, 2], pads=[1, 2, 1, 2]), **CONV),
    "conv1d": lambda: rows(conv("y", pads=[1, 1]), shape=(4, 16), w=normal(8, 4, 3), b=CONV["b"]),
    "conv3d": lambda: rows(conv("y", pads=[1] * 6), shape=(4, 5, 5, 5), w=normal(8, 4, 3, 3, 3), b=CONV["b"]),
    "transposed": lambda: image(
        node("ConvTranspose", ["x", "w", "b"], ["y"], strides=[2, 2], pads=PAD), w=normal(4, 8, 3, 3), b=CONV["b"]
    ),
    "transposed_groups": lambda: image(
        node("ConvTranspose", ["x", "w", "b"], ["y"], strides=[2, 2], group=2), w=normal(4, 4, 3, 3), b=CONV["b"]
    ),
    "batch_norm": lambda: image(
        conv(), node("BatchNormalization", ["c", "ga", "be", "me", "va"], ["n"]), node("Relu", ["n"], ["y"]),
        **CONV, **NORM,
    ),
    "batch_norm_first": lambda: image(
        node("BatchNormalization", ["x", "ga", "be", "me", "va"], ["y"]), c=8, **NORM
    ),
    "gemm": lambda: rows(node("Gemm", ["x", "w", "b"], ["y"]), shape=(16,), **BIASED),
    "gemm_turned": lambda: rows(
        node("Gemm", ["x", "w", "b"], ["y"], transB=1, alpha=0.5), shape=(16,), w=normal(8, 16), b=BIASED["b"]
    ),
    "gemm_beta": lambda: rows(node("Gemm", ["x", "w", "b"], ["y"], beta=2.0), shape=(16,), **BIASED),
    "matmul": lambda: rows(node("MatMul", ["x", "w"], ["y"]), w=BIASED["w"]),
    "matmul_bias": lambda: rows(node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["y"]), **BIASED),
    "matmul_bias_rows": lambda: rows(
        node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["a"]), node("Relu", ["a"], ["y"]), shape=(16,),
        **BIASED,
    ),
    "matmul_of_activations": lambda: rows(
        node("MatMul", ["x", "w"], ["p"]), node("Transpose", ["p"], ["q"], perm=[0, 2, 1]),
        node("MatMul", ["p", "q"], ["y"]), w=normal(16, 16),
    ),
    "leaky_relu": after_conv("LeakyRelu", alpha=0.1),
    "sigmoid": after_conv("Sigmoid"),
    "hard_swish": after_conv("HardSwish"),
    "gelu": after_conv("Gelu", 20),
    "softmax": after_conv("Softmax", axis=-1),
    "log_softmax": after_conv("LogSoftmax", axis=-1),
    "hardmax": after_conv("Hardmax", axis=-1),
    "prelu": lambda: after_conv("PRelu", extra=("slope",))(slope=np.abs(normal(8, 1, 1, scale=0.2))),
    "layer_norm": lambda: rows(
        node("LayerNormalization", ["x", "ga", "be"], ["y"], axis=-1), ga=normal(16), be=normal(16, seed=1)
    ),
    "instance_norm": lambda: after_conv("InstanceNormalization", extra=("ga", "be"))(ga=NORM["ga"], be=NORM["be"]),
    "embedding": embedding,
    "average_pool": after_conv("AveragePool", kernel_shape=[2, 2], strides=[2, 2]),
    "average_pool_padded": after_conv("AveragePool", kernel_shape=[3, 3], pads=PAD),
    "average_pool_counted": after_conv("AveragePool", kernel_shape=[3, 3], pads=PAD, count_include_pad=1),
    "average_pool_ceil": after_conv("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "global_pool": after_conv("GlobalAveragePool"),
    "mean": after_conv("ReduceMean", axes=[2, 3], keepdims=0),
    "max_pool": after_conv("MaxPool", kernel_shape=[3, 3], pads=PAD, strides=[2, 2]),
    "add": lambda: two_convs("Add"),
    "mul": lambda: two_convs("Mul"),
    "mul_constant": lambda: rows(node("Mul", ["x", "k"], ["y"]), k=normal(16)),
    "mul_channels": lambda: after_conv("Mul", extra=("k",))(k=normal(8, 1, 1)),
    "mul_scalar": lambda: after_conv("Mul", extra=("k",))(k=np.float32(0.37)),
    "gate": lambda: image(
        conv(), node("GlobalAveragePool", ["c"], ["g"]), node("Mul", ["c", "g"], ["y"]), **CONV),
    "sub": lambda: two_convs("Sub"),
    "concat": lambda: two_convs("Concat", axis=1),
    "add_constant": lambda: rows(node("Add", ["x", "k"], ["y"]), k=normal(16)),
    "maximum": lambda: rows(node("Max", ["x", "k"], ["y"]), k=normal(16)),
    "split": lambda: image(
        conv(), node("Split", ["c", "sizes"], ["y", "z"], axis=1), outputs=("y", "z"), sizes=ints(3, 5), **CONV
    ),
    "pad": lambda: after_conv("Pad", extra=("pads",))(pads=ints(0, 0, 1, 1, 0, 0, 1, 1)),
    "pad_with_value": lambda: after_conv("Pad", extra=("pads", "v"))(
        pads=ints(0, 0, 1, 1, 0, 0, 1, 1), v=np.float32(0.3)
    ),
    "transpose": after_conv("Transpose", perm=[0, 2, 3, 1]),
    "resize_nearest": lambda: after_conv("Resize", extra=("", "s"), mode="nearest")(
        s=np.array([1, 1, 2, 2], np.float32)
    ),
    "resize_linear": lambda: after_conv("Resize", extra=("", "s"), mode="linear")(
        s=np.array([1, 1, 2, 2], np.float32)
    ),
    "shared_bias": shared_bias,
    "gemm_called_twice": lambda: rows(
        node("Gemm", ["x", "w", "b"], ["p"]), node("Gemm", ["p", "w", "b"], ["y"]), shape=(8,),
        w=normal(8, 8, scale=0.3), b=normal(8, scale=2.0),
    ),
    "lstm": lstm,
    "attention": attention,
    "squeeze_excite": squeeze_excite,
}  # fmt: skip
