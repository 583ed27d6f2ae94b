"""Which Keras layer, operation or activation is of which canonical kind and ONNX type."""

from __future__ import annotations

from collections.abc import Mapping

from bitwright.graph import OpKind

K = OpKind


def _all(names: str, kind: OpKind, type: str = "") -> dict[str, tuple[OpKind, str]]:
    return {name: (kind, type or name) for name in names.split()}


AUGMENTATION = frozenset({
    "AugMix", "CutMix", "MixUp", "RandAugment", "RandomBrightness", "RandomColorDegeneration", "RandomColorJitter",
    "RandomContrast", "RandomElasticTransform", "RandomErasing", "RandomFlip", "RandomGaussianBlur", "RandomGrayscale",
    "RandomHue", "RandomInvert", "RandomPerspective", "RandomPosterization", "RandomRotation", "RandomSaturation",
    "RandomSharpness", "RandomShear", "RandomTranslation", "RandomZoom",
})  # fmt: skip
"""Layers that change training data only; in inference they pass their input on."""

LAYERS: Mapping[str, tuple[OpKind, str]] = {
    **_all("Conv1D Conv2D Conv3D DepthwiseConv1D DepthwiseConv2D", K.CONV, "Conv"),
    **_all("Conv1DTranspose Conv2DTranspose Conv3DTranspose", K.CONV_TRANSPOSE, "ConvTranspose"),
    **_all("Dense", K.LINEAR, "Gemm"),
    **_all("EinsumDense", K.OPAQUE),
    **_all("Embedding", K.EMBEDDING, "Gather"),
    **_all("BatchNormalization", K.BATCH_NORM),
    **_all("LayerNormalization", K.LAYER_NORM),
    **_all("GroupNormalization", K.NORM),
    **_all("RMSNormalization", K.NORM),
    **_all("UnitNormalization", K.NORM, "LpNormalization"),
    **_all("ReLU", K.RELU, "Relu"),
    **_all("LeakyReLU", K.PRELU, "LeakyRelu"),
    **_all("PReLU", K.PRELU, "PRelu"),
    **_all("ELU", K.ACTIVATION, "Elu"),
    **_all("Softmax", K.SOFTMAX),
    **_all("Activation", K.ACTIVATION),
    **_all("Add", K.ADD),
    **_all("Multiply", K.MUL, "Mul"),
    **_all("Subtract", K.ELEMENTWISE, "Sub"),
    **_all("Maximum", K.ELEMENTWISE, "Max"),
    **_all("Minimum", K.ELEMENTWISE, "Min"),
    **_all("Average", K.ELEMENTWISE, "Mean"),
    **_all("Concatenate", K.CONCAT, "Concat"),
    **_all("Dot", K.MATMUL, "MatMul"),
    **_all("AveragePooling1D AveragePooling2D AveragePooling3D", K.AVERAGE_POOL, "AveragePool"),
    **_all("GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D", K.AVERAGE_POOL,
           "GlobalAveragePool"),
    **_all("MaxPooling1D MaxPooling2D MaxPooling3D AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D",
           K.MAX_POOL, "MaxPool"),
    **_all("AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D", K.AVERAGE_POOL,
           "AveragePool"),
    **_all("GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D", K.MAX_POOL, "GlobalMaxPool"),
    **_all("UpSampling1D UpSampling2D UpSampling3D Resizing", K.RESIZE, "Resize"),
    **_all("Flatten", K.RESHAPE),
    **_all("Reshape", K.RESHAPE),
    **_all("RepeatVector", K.RESHAPE, "Tile"),
    **_all("Permute", K.TRANSPOSE, "Transpose"),
    **_all("Cropping1D Cropping2D Cropping3D CenterCrop", K.SLICE, "Slice"),
    **_all("ZeroPadding1D ZeroPadding2D ZeroPadding3D", K.PAD, "Pad"),
    **_all("Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D AlphaDropout GaussianDropout GaussianNoise "
           "ActivityRegularization", K.IDENTITY, "Dropout"),
    **dict.fromkeys(AUGMENTATION, (K.IDENTITY, "Dropout")),
    **_all("Identity", K.IDENTITY),
}  # fmt: skip
"""By class of Keras's own layers; all else is OPAQUE and runs in float."""

OPERATIONS: Mapping[str, tuple[OpKind, str]] = {
    **_all("Add", K.ADD),
    **_all("Multiply", K.MUL, "Mul"),
    **_all("Subtract", K.ELEMENTWISE, "Sub"),
    **_all("Divide TrueDivide", K.ELEMENTWISE, "Div"),
    **_all("Power", K.ELEMENTWISE, "Pow"),
    **_all("Square Rsqrt", K.ELEMENTWISE, "Pow"),
    **_all("Maximum", K.ELEMENTWISE, "Max"),
    **_all("Minimum", K.ELEMENTWISE, "Min"),
    **_all("Where", K.ELEMENTWISE),
    **_all("Sum", K.ELEMENTWISE, "ReduceSum"),
    **_all("Prod", K.ELEMENTWISE, "ReduceProd"),
    **_all("Norm", K.ELEMENTWISE, "ReduceL2"),
    **_all("Logsumexp", K.ELEMENTWISE, "ReduceLogSumExp"),
    **_all("Cumsum", K.ELEMENTWISE, "CumSum"),
    **_all("Mod Remainder", K.ELEMENTWISE, "Mod"),
    **_all("Matmul Dot", K.MATMUL, "MatMul"),
    **_all("Einsum", K.MATMUL),
    **_all("Conv DepthwiseConv", K.MATMUL, "Conv"),  # of two activations
    **_all("ConvTranspose", K.MATMUL),
    **_all("Relu", K.RELU),
    **_all("Relu6", K.CLIPPED_RELU, "Clip"),
    **_all("Clip", K.ACTIVATION),
    **_all("HardTanh", K.ACTIVATION, "Clip"),
    **_all("LeakyRelu", K.PRELU),
    **_all("Silu", K.ACTIVATION, "Swish"),
    **_all("HardSilu", K.ACTIVATION, "HardSwish"),
    **_all("Absolute Abs", K.ACTIVATION, "Abs"),
    **_all("Negative", K.ACTIVATION, "Neg"),
    **_all("SoftShrink HardShrink", K.ACTIVATION, "Shrink"),
    **_all("Threshold", K.ACTIVATION, "ThresholdedRelu"),
    **_all("Sigmoid Tanh Elu Selu Celu Softplus Softsign Gelu Erf Mish Exp Log Sqrt Reciprocal Floor Ceil Round Sign "
           "Sin Cos Tan Sinh Cosh HardSigmoid", K.ACTIVATION),
    **_all("Softmax", K.SOFTMAX),
    **_all("LogSoftmax", K.SOFTMAX),
    **_all("Concatenate Stack", K.CONCAT, "Concat"),
    **_all("Split Unstack", K.SPLIT, "Split"),
    **_all("Mean", K.AVERAGE_POOL, "ReduceMean"),
    **_all("Max Amax", K.MAX_POOL, "ReduceMax"),
    **_all("Min Amin", K.MAX_POOL, "ReduceMin"),
    **_all("MaxPool", K.MAX_POOL),
    **_all("Reshape Ravel", K.RESHAPE, "Reshape"),
    **_all("Squeeze", K.RESHAPE),
    **_all("ExpandDims", K.RESHAPE, "Unsqueeze"),
    **_all("BroadcastTo", K.RESHAPE, "Expand"),
    **_all("Tile Repeat", K.RESHAPE, "Tile"),
    **_all("DepthToSpace", K.RESHAPE),
    **_all("SpaceToDepth", K.RESHAPE),
    **_all("Transpose Swapaxes Moveaxis", K.TRANSPOSE, "Transpose"),
    **_all("GetItem Slice Flip Roll", K.SLICE, "Slice"),
    **_all("Take TakeAlongAxis", K.SLICE, "Gather"),
    **_all("Pad", K.PAD),
    **_all("Resize", K.RESIZE),
    **_all("Identity StopGradient Copy", K.IDENTITY, "Identity"),
    **_all("Cast", K.ELEMENTWISE),
}  # fmt: skip
"""By class of `keras.ops` operations; all else is OPAQUE."""

FUNCTIONS: Mapping[str, tuple[OpKind, str]] = {
    "relu": (K.RELU, "Relu"),
    "relu6": (K.CLIPPED_RELU, "Clip"),
    "leaky_relu": (K.PRELU, "LeakyRelu"),
    "linear": (K.IDENTITY, "Identity"),
    "softmax": (K.SOFTMAX, "Softmax"),
    "log_softmax": (K.SOFTMAX, "LogSoftmax"),
    "silu": (K.ACTIVATION, "Swish"),
    "hard_silu": (K.ACTIVATION, "HardSwish"),
    "exponential": (K.ACTIVATION, "Exp"),
    "hard_tanh": (K.ACTIVATION, "Clip"),
    "soft_shrink": (K.ACTIVATION, "Shrink"),
    "hard_shrink": (K.ACTIVATION, "Shrink"),
    "threshold": (K.ACTIVATION, "ThresholdedRelu"),
    **{
        name: (K.ACTIVATION, type)
        for name, type in {
            "sigmoid": "Sigmoid", "tanh": "Tanh", "elu": "Elu", "selu": "Selu", "celu": "Celu",
            "softplus": "Softplus", "softsign": "Softsign", "gelu": "Gelu", "mish": "Mish",
            "hard_sigmoid": "HardSigmoid",
        }.items()
    },
}  # fmt: skip
"""By name of Keras's own activation functions; others (squareplus, sparsemax, …) are OPAQUE."""
