"""Which TensorFlow op is of which canonical kind and ONNX type, for ops that are one node."""

from __future__ import annotations

from collections.abc import Mapping

from bitwright.graph import OpKind

K = OpKind


def _all(names: str, kind: OpKind, type: str = "") -> dict[str, tuple[OpKind, str]]:
    return {name: (kind, type or name) for name in names.split()}


KINDS: Mapping[str, tuple[OpKind, str]] = {
    **_all("MatMul BatchMatMul BatchMatMulV2 BatchMatMulV3", K.MATMUL, "MatMul"),
    **_all("Einsum", K.MATMUL),
    **_all("Relu", K.RELU),
    **_all("LeakyRelu", K.PRELU),
    **_all("Sigmoid Tanh Elu Selu Softplus Softsign Erf Exp Log Sqrt Abs Neg Floor Ceil Sign Sin Cos Tan Asin Acos "
           "Atan Sinh Cosh Asinh Acosh Atanh Erfc Log1p Expm1", K.ACTIVATION),
    **_all("Round Rint", K.ACTIVATION, "Round"),
    **_all("Inv Reciprocal", K.ACTIVATION, "Reciprocal"),
    **_all("Softmax", K.SOFTMAX),
    **_all("LogSoftmax", K.SOFTMAX),
    **_all("Add AddV2 BiasAdd", K.ADD, "Add"),
    **_all("AddN", K.ADD, "Sum"),
    **_all("Mul Square", K.MUL, "Mul"),
    **_all("Sub", K.ELEMENTWISE),
    **_all("RealDiv Div DivNoNan", K.ELEMENTWISE, "Div"),
    **_all("Maximum", K.ELEMENTWISE, "Max"),
    **_all("Minimum", K.ELEMENTWISE, "Min"),
    **_all("Pow Rsqrt", K.ELEMENTWISE, "Pow"),
    **_all("FloorMod Mod", K.ELEMENTWISE, "Mod"),
    **_all("Select SelectV2", K.ELEMENTWISE, "Where"),
    **_all("SquaredDifference", K.ELEMENTWISE),
    **_all("Sum", K.ELEMENTWISE, "ReduceSum"),
    **_all("Prod", K.ELEMENTWISE, "ReduceProd"),
    **_all("EuclideanNorm", K.ELEMENTWISE, "ReduceL2"),
    **_all("Cumsum", K.ELEMENTWISE, "CumSum"),
    **_all("ConcatV2 Concat Pack ParallelConcat", K.CONCAT, "Concat"),
    **_all("Split SplitV Unpack", K.SPLIT, "Split"),
    **_all("AvgPool AvgPool3D", K.AVERAGE_POOL, "AveragePool"),
    **_all("Mean", K.AVERAGE_POOL, "ReduceMean"),
    **_all("MaxPool MaxPoolV2 MaxPool3D", K.MAX_POOL, "MaxPool"),
    **_all("Max", K.MAX_POOL, "ReduceMax"),
    **_all("Min", K.MAX_POOL, "ReduceMin"),
    **_all("ResizeBilinear ResizeNearestNeighbor ResizeBicubic ResizeArea ScaleAndTranslate", K.RESIZE, "Resize"),
    **_all("Reshape", K.RESHAPE),
    **_all("ExpandDims", K.RESHAPE, "Unsqueeze"),
    **_all("Squeeze", K.RESHAPE),
    **_all("BroadcastTo", K.RESHAPE, "Expand"),
    **_all("Tile DepthToSpace SpaceToDepth", K.RESHAPE),
    **_all("SpaceToBatchND SpaceToBatch", K.RESHAPE, "SpaceToBatch"),
    **_all("BatchToSpaceND BatchToSpace", K.RESHAPE, "BatchToSpace"),
    **_all("Transpose", K.TRANSPOSE),
    **_all("StridedSlice Slice ReverseV2", K.SLICE, "Slice"),
    **_all("Gather GatherV2 GatherNd", K.SLICE, "Gather"),
    **_all("Pad PadV2 MirrorPad", K.PAD, "Pad"),
    **_all("Identity StopGradient PreventGradient Snapshot EnsureShape CheckNumerics", K.IDENTITY, "Identity"),
    **_all("LRN", K.NORM),
}  # fmt: skip
"""All else is OPAQUE and runs in float."""

QUANTIZED_OPS = frozenset({"FakeQuantWithMinMaxArgs", "FakeQuantWithMinMaxVars", "FakeQuantWithMinMaxVarsPerChannel",
                           "QuantizeV2", "Dequantize", "QuantizeAndDequantize", "QuantizeAndDequantizeV2",
                           "QuantizeAndDequantizeV3", "QuantizeAndDequantizeV4", "QuantizedConv2D",
                           "QuantizedMatMul", "UniformQuantize", "UniformDequantize"})  # fmt: skip
"""Ops that only models which are quantized already contain."""
