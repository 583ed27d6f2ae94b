"""Which aten op is of which canonical kind and ONNX type. Operands and attributes are looked at in `canonical`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from bitwright.graph import OpKind
from bitwright_torch.graph.naming import call_name

K = OpKind


def _all(names: str, kind: OpKind, type: str = "") -> dict[str, tuple[OpKind, str]]:
    return {name: (kind, type or "".join(p.capitalize() for p in name.split("_"))) for name in names.split()}


KINDS: Mapping[str, tuple[OpKind, str]] = {
    **_all("conv1d conv2d conv3d convolution", K.CONV, "Conv"),
    **_all("conv_transpose1d conv_transpose2d conv_transpose3d", K.CONV_TRANSPOSE, "ConvTranspose"),
    **_all("linear addmm", K.LINEAR, "Gemm"),
    **_all("matmul bmm mm mv", K.MATMUL, "MatMul"),
    **_all("baddbmm", K.MATMUL, "Gemm"),
    **_all("einsum", K.MATMUL, "Einsum"),
    **_all("embedding", K.EMBEDDING, "Gather"),
    **_all("batch_norm", K.BATCH_NORM, "BatchNormalization"),
    **_all("layer_norm", K.LAYER_NORM, "LayerNormalization"),
    **_all("group_norm", K.NORM, "GroupNormalization"),
    **_all("instance_norm", K.NORM, "InstanceNormalization"),
    **_all("rms_norm", K.NORM, "RMSNormalization"),
    **_all("relu", K.RELU, "Relu"),
    **_all("relu6 hardtanh clamp clamp_min clamp_max clip", K.ACTIVATION, "Clip"),
    **_all("leaky_relu", K.PRELU, "LeakyRelu"),
    **_all("prelu", K.PRELU, "PRelu"),
    **_all("sigmoid tanh elu selu celu softplus softsign gelu erf mish exp log sqrt abs neg reciprocal floor ceil "
           "round sign sin cos tan asin acos atan sinh cosh asinh acosh atanh", K.ACTIVATION),
    **_all("special_erf", K.ACTIVATION, "Erf"),
    **_all("silu", K.ACTIVATION, "Swish"),
    **_all("hardswish", K.ACTIVATION, "HardSwish"),
    **_all("hardsigmoid", K.ACTIVATION, "HardSigmoid"),
    **_all("hardshrink softshrink", K.ACTIVATION, "Shrink"),
    **_all("threshold", K.ACTIVATION, "ThresholdedRelu"),
    **_all("logsigmoid log_sigmoid", K.ACTIVATION, "LogSigmoid"),
    **_all("tanhshrink expm1 log1p log2 log10 exp2 erfc rrelu frac", K.ACTIVATION),
    **_all("softmax attention_softmax", K.SOFTMAX, "Softmax"),
    **_all("log_softmax", K.SOFTMAX, "LogSoftmax"),
    **_all("add", K.ADD, "Add"),
    **_all("mul multiply scale_query", K.MUL, "Mul"),
    **_all("sub rsub", K.ELEMENTWISE, "Sub"),
    **_all("div divide true_divide", K.ELEMENTWISE, "Div"),
    **_all("pow square rsqrt", K.ELEMENTWISE, "Pow"),
    **_all("maximum", K.ELEMENTWISE, "Max"),
    **_all("minimum", K.ELEMENTWISE, "Min"),
    **_all("where masked_fill tril triu", K.ELEMENTWISE, "Where"),
    **_all("remainder fmod", K.ELEMENTWISE, "Mod"),
    **_all("sum", K.ELEMENTWISE, "ReduceSum"),
    **_all("prod", K.ELEMENTWISE, "ReduceProd"),
    **_all("norm linalg_vector_norm", K.ELEMENTWISE, "ReduceL2"),
    **_all("logsumexp", K.ELEMENTWISE, "ReduceLogSumExp"),
    **_all("cumsum", K.ELEMENTWISE, "CumSum"),
    **_all("slice_scatter select_scatter diagonal_scatter index_put scatter", K.ELEMENTWISE, "ScatterND"),
    **_all("glu", K.ELEMENTWISE, "Glu"),
    **_all("cat concat concatenate stack hstack vstack", K.CONCAT, "Concat"),
    **_all("split chunk split_with_sizes unbind tensor_split", K.SPLIT, "Split"),
    **_all("avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
           K.AVERAGE_POOL, "AveragePool"),
    **_all("mean", K.AVERAGE_POOL, "ReduceMean"),
    **_all("max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
           "max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
           K.MAX_POOL, "MaxPool"),
    **_all("amax max", K.MAX_POOL, "ReduceMax"),
    **_all("amin min", K.MAX_POOL, "ReduceMin"),
    **_all("upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
           "upsample_bicubic2d upsample_trilinear3d upsample_nearest_exact1d upsample_nearest_exact2d "
           "upsample_bilinear2d_aa upsample_bicubic2d_aa", K.RESIZE, "Resize"),
    **_all("reshape reshape_as view unsafe_view view_as unflatten", K.RESHAPE, "Reshape"),
    **_all("flatten", K.RESHAPE, "Flatten"),
    **_all("squeeze", K.RESHAPE, "Squeeze"),
    **_all("unsqueeze", K.RESHAPE, "Unsqueeze"),
    **_all("expand expand_as broadcast_to", K.RESHAPE, "Expand"),
    **_all("repeat tile repeat_interleave repeat_heads", K.RESHAPE, "Tile"),
    **_all("pixel_shuffle", K.RESHAPE, "DepthToSpace"),
    **_all("pixel_unshuffle", K.RESHAPE, "SpaceToDepth"),
    **_all("channel_shuffle", K.RESHAPE, "ChannelShuffle"),
    **_all("transpose permute t numpy_T movedim moveaxis swapaxes", K.TRANSPOSE, "Transpose"),
    **_all("slice select narrow roll flip diagonal unfold", K.SLICE, "Slice"),
    **_all("index_select index gather take_along_dim", K.SLICE, "Gather"),
    **_all("pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
           "replication_pad2d replication_pad3d", K.PAD, "Pad"),
    **_all("dropout feature_dropout alpha_dropout", K.IDENTITY, "Dropout"),
    **_all("contiguous clone alias detach lift_fresh_copy", K.IDENTITY, "Identity"),
    **_all("to to_copy type_as", K.IDENTITY, "Cast"),
    **_all("lstm", K.RECURRENT, "LSTM"),
    **_all("gru", K.RECURRENT, "GRU"),
    **_all("rnn_tanh rnn_relu", K.RECURRENT, "RNN"),
}  # fmt: skip
"""By name of the aten op, or of the function that stands for one; all else is OPAQUE and runs in float."""

CLIPS: Mapping[str, tuple[float | None, float | None]] = {
    "relu6": (0.0, 6.0),
    "hardtanh": (-1.0, 1.0),
    "clamp": (None, None),
    "clip": (None, None),
    "clamp_min": (None, None),
    "clamp_max": (None, None),
}
"""Default bounds of the ops that are a Clip."""

_OF_TWO = {"max": "maximum", "min": "minimum"}


def kind_of(node: fx.Node) -> tuple[OpKind, str]:
    """Kind and ONNX type of what a node calls; OPAQUE and the call's own name where there is none.

    `max` and `min` reduce one tensor, or choose between two element by element (overload "other").
    """
    name = call_name(node)
    if name in _OF_TWO and getattr(node.target, "_overloadname", "") == "other":
        name = _OF_TWO[name]
    return KINDS.get(name, (OpKind.OPAQUE, name))
