"""What targets need to know about ONNX operator names: which exist, and which pass a grid through."""

from __future__ import annotations

from collections.abc import Mapping

from bitwright.graph._graph import Op, OpKind, ParamId, ParamRole, TensorId

ONNX_TYPES = frozenset(
    """
    Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization
    Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast CastLike
    CausalConvWithState Ceil Celu CenterCropPad Clip Col2Im Compress Concat ConcatFromSequence Constant
    ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumProd CumSum DFT DeformConv DepthToSpace
    DequantizeLinear Det Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU
    Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual
    GridSample GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If ImageDecoder
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual LinearAttention Log
    LogSoftmax Loop LpNormalization LpPool MatMul MatMulInteger Max MaxPool MaxRoiPool MaxUnpool Mean
    MeanVarianceNormalization MelWeightMatrix Min Mish Mod Mul Multinomial Neg NegativeLogLikelihoodLoss
    NonMaxSuppression NonZero Not OneHot Optional OptionalGetElement OptionalHasElement Or PRelu Pad Pow QLinearConv
    QLinearMatMul QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike
    Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare RegexFullMatch Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round STFT
    Scan Scatter ScatterElements ScatterND Selu SequenceAt SequenceConstruct SequenceEmpty SequenceErase
    SequenceInsert SequenceLength SequenceMap Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
    SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split SplitToSequence Sqrt Squeeze StringConcat
    StringNormalizer StringSplit Sub Sum SwiGLU Swish Tan Tanh TensorScatter TfIdfVectorizer ThresholdedRelu Tile
    TopK Transpose Trilu Unique Unsqueeze Upsample Where Xor
    """.split()  # noqa: SIM905
)
"""Every operator of the default ONNX domain, deprecated ones included."""

VENDOR_TYPES = frozenset(
    """
    BatchPermutation BatchToSpace ChannelShuffle CropAndResize Glu LogSigmoid Moments SpaceToBatch
    BiasGelu FastGelu FusedConv FusedGemm FusedMatMul QuickGelu SkipLayerNormalization SkipSimplifiedLayerNormalization
    SimplifiedLayerNormalization
    """.split()  # noqa: SIM905
)
"""Names outside ONNX that AIMET's configuration files, PyTorch's layers and ONNX Runtime's graphs use."""

_NAMES = {
    "Conv": "Conv1d Conv2d Conv3d Conv1D Conv2D Conv3D Convolution1D Convolution2D Convolution3D DepthwiseConv1D "
    "DepthwiseConv2D DepthwiseConv2dNative SeparableConv1D SeparableConv2D",
    "ConvTranspose": "ConvTranspose1d ConvTranspose2d ConvTranspose3d Conv1DTranspose Conv2DTranspose Conv3DTranspose "
    "Convolution1DTranspose Convolution2DTranspose Convolution3DTranspose Conv2DBackpropInput",
    "Gemm": "Linear Dense",
    "Gather": "Embedding GatherV2",
    "BatchNormalization": "BatchNorm BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm FusedBatchNorm FusedBatchNormV2 "
    "FusedBatchNormV3",
    "LayerNormalization": "LayerNorm",
    "GroupNormalization": "GroupNorm",
    "InstanceNormalization": "InstanceNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d",
    "RMSNormalization": "RMSNorm RmsNorm",
    "LRN": "LocalResponseNorm",
    "Relu": "ReLU",
    "Clip": "ReLU6 Relu6 Hardtanh HardTanh",
    "PRelu": "PReLU",
    "LeakyRelu": "LeakyReLU",
    "ThresholdedRelu": "ThresholdedReLU",
    "Elu": "ELU",
    "Selu": "SELU",
    "Celu": "CELU",
    "Gelu": "GELU",
    "Swish": "SiLU Silu",
    "HardSwish": "Hardswish HardSiLU",
    "HardSigmoid": "Hardsigmoid",
    "Glu": "GLU",
    "LogSigmoid": "Logsigmoid",
    "Softmax": "Softmin",  # a softmax, of what is negated
    "LogSoftmax": "Logsoftmax",
    "Add": "Addition AddV2",
    "Sub": "Subtract",
    "Mul": "Multiply",
    "Div": "Divide RealDiv",
    "Max": "Maximum",
    "Min": "Minimum",
    "Concat": "Concatenate ConcatV2",
    "MatMul": "Matmul BatchMatMul BatchMatMulV2 BatchMatMulV3",
    "AveragePool": "AvgPool AvgPool1d AvgPool2d AvgPool3d AvgPool1D AvgPool2D AvgPool3D AveragePooling1D "
    "AveragePooling2D AveragePooling3D",
    "GlobalAveragePool": "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d GlobalAveragePooling1D "
    "GlobalAveragePooling2D GlobalAveragePooling3D GlobalAvgPool1D GlobalAvgPool2D GlobalAvgPool3D",
    "MaxPool": "MaxPool1d MaxPool2d MaxPool3d MaxPool1D MaxPool2D MaxPool3D MaxPooling1D MaxPooling2D MaxPooling3D",
    "GlobalMaxPool": "AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d GlobalMaxPooling1D GlobalMaxPooling2D "
    "GlobalMaxPooling3D GlobalMaxPool1D GlobalMaxPool2D GlobalMaxPool3D",
    "Resize": "UpSampling1D UpSampling2D UpSampling3D Interpolate ResizeBicubic ResizeBilinear ResizeNearestNeighbor",
    "DepthToSpace": "PixelShuffle",
    "SpaceToDepth": "PixelUnshuffle",
    "Transpose": "Permute",
    "Slice": "StridedSlice Cropping1D Cropping2D Cropping3D",
    "Pad": "ZeroPadding1D ZeroPadding2D ZeroPadding3D PadV2 MirrorPad ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d "
    "ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d "
    "ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d",
    "RNN": "SimpleRNN",
    "Exp": "Exponential",
    "Mean": "Average",
    "Shrink": "Hardshrink Softshrink",
    "Split": "SplitV",
    "Unsqueeze": "ExpandDims",
    "Where": "SelectV2",
    "ReduceProd": "Prod",
    "ArgMax": "Argmax",
    "ArgMin": "Argmin",
    "TopK": "TopKV2",
    "NonMaxSuppression": "NonMaxSuppressionV2 NonMaxSuppressionV3 NonMaxSuppressionV4 NonMaxSuppressionV5",
}
OTHER_NAMES: Mapping[str, str] = {name: type for type, names in _NAMES.items() for name in names.split()}
"""ONNX type by the names that configuration files of PyTorch's, Keras's and TensorFlow's tools give it."""
LINEAR_LAYER = "Linear"
"""The type under which configuration files' settings of linear layers are kept, beside Gemm: PyTorch's and Keras's
tools name the layer (`Linear`, `Dense`), which is a MatMul with a weight where its input isn't a matrix."""

K = OpKind
KINDS: Mapping[str, OpKind] = {
    **dict.fromkeys(("Conv",), K.CONV),
    **dict.fromkeys(("ConvTranspose",), K.CONV_TRANSPOSE),
    **dict.fromkeys(("Gemm",), K.LINEAR),
    **dict.fromkeys(("MatMul", "Einsum"), K.MATMUL),
    **dict.fromkeys(("BatchNormalization",), K.BATCH_NORM),
    **dict.fromkeys(("LayerNormalization",), K.LAYER_NORM),
    **dict.fromkeys(
        ("InstanceNormalization", "GroupNormalization", "RMSNormalization", "LpNormalization", "LRN",
         "MeanVarianceNormalization"),
        K.NORM,
    ),
    **dict.fromkeys(("Relu",), K.RELU),
    **dict.fromkeys(("LeakyRelu", "PRelu"), K.PRELU),
    **dict.fromkeys(
        ("Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "Celu", "Softplus", "Softsign", "Gelu",
         "Erf", "Mish", "Swish", "ThresholdedRelu", "Shrink", "Exp", "Log", "Sqrt", "Abs", "Neg", "Reciprocal",
         "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh",
         "Acosh", "Atanh"),
        K.ACTIVATION,
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), K.SOFTMAX),
    **dict.fromkeys(("Add", "Sum"), K.ADD),
    **dict.fromkeys(("Mul",), K.MUL),
    **dict.fromkeys(
        ("Sub", "Div", "Max", "Min", "Pow", "Mean", "Mod", "Where", "ReduceSum", "ReduceL1", "ReduceL2",
         "ReduceProd", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp", "CumSum"),
        K.ELEMENTWISE,
    ),
    **dict.fromkeys(("Concat",), K.CONCAT),
    **dict.fromkeys(("Split",), K.SPLIT),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "ReduceMean"), K.AVERAGE_POOL),
    **dict.fromkeys(("MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "MaxRoiPool"), K.MAX_POOL),
    **dict.fromkeys(("Resize", "Upsample"), K.RESIZE),
    **dict.fromkeys(
        ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"), K.RESHAPE
    ),
    **dict.fromkeys(("Transpose",), K.TRANSPOSE),
    **dict.fromkeys(("Slice", "Gather", "GatherElements", "GatherND", "Compress"), K.SLICE),
    **dict.fromkeys(("Pad",), K.PAD),
    **dict.fromkeys(("Identity", "Dropout"), K.IDENTITY),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), K.RECURRENT),
}  # fmt: skip
"""Kind by operator of the default domain, before operands and attributes are looked at; all else is OPAQUE."""

GRID_PRESERVING_KINDS = frozenset(
    {OpKind.RESHAPE, OpKind.TRANSPOSE, OpKind.SLICE, OpKind.SPLIT, OpKind.MAX_POOL, OpKind.IDENTITY}
)
GRID_PRESERVING_TYPES = frozenset(
    """
    BatchToSpace Cast ChannelShuffle Compress DepthToSpace Dropout Expand Flatten GatherElements GatherND
    GlobalMaxPool Identity MaxPool ReduceMax ReduceMin Reshape Slice SpaceToBatch SpaceToDepth Split SplitToSequence
    Squeeze Tile TopK Transpose Unsqueeze
    """.split()  # noqa: SIM905
)
"""Outputs hold values of the first input and no others, so its grid serves them exactly (ONNX semantics)."""

NEVER_NEGATIVE_TYPES = frozenset({
    "Abs", "Exp", "HardSigmoid", "Relu", "Relu6", "Sigmoid", "Softmax", "Softplus", "Square",
})  # fmt: skip
"""Types of ops, by ONNX's and by frameworks' names, whose outputs can't be negative."""

INTEGER_TYPES = frozenset({"Shape", "Size", "NonZero", "ArgMax", "ArgMin", "NonMaxSuppression", "SequenceLength"})
"""Outputs are indices or sizes, whatever a backend without type information says."""


def never_negative(type: str, minimum: float | None = None) -> bool:
    """Whether an op of this type can't give negative values; a clip where its `minimum` says so."""
    return type in NEVER_NEGATIVE_TYPES or (type == "Clip" and minimum is not None and minimum >= 0)


def preserves_grid(op: Op) -> bool:
    """Whether an op only selects, repeats or moves values of its first input.

    A padding counts when it brings no value of its own but zero, which every grid represents.
    """
    if op.kind is OpKind.OPAQUE or not op.data_inputs or op.inputs[0] is None:
        return False
    if op.kind is OpKind.PAD:
        return ParamRole.CONSTANT not in op.params
    return op.kind in GRID_PRESERVING_KINDS or op.type in GRID_PRESERVING_TYPES


def moved_from(op: Op) -> tuple[TensorId | ParamId, ...]:
    """The tensors and parameters that an op's output values come from, unchanged; empty where it computes new ones.

    Dropout counts, whose larger values in training must not clip. A cast doesn't: a narrower type rounds.
    """
    if op.kind is OpKind.EMBEDDING:
        return () if op.weight is None else (op.weight,)
    if op.kind is OpKind.CONCAT:
        return (*op.data_inputs, *op.params.values())
    return op.data_inputs[:1] if op.type != "Cast" and preserves_grid(op) else ()
