"""A small CNN's encodings: every kind of entry that files know, with the vectors verified on AIMET."""

from __future__ import annotations

import numpy as np

from bitwright.formats import EncodingsFile, TensorGeometry, permute, unbind
from bitwright.grids import (
    Blockwise,
    Encoding,
    PerChannel,
    Provenance,
    QuantSpec,
    encoding_from_range,
    encoding_of_weights,
)

LPBQ_WEIGHT = np.array([[1, -2, 3, -4, 0.5, 0.25, -0.125, 0.06], [7, -7, 1, 1, 2, 2, -3, -1]], np.float32)
CONV_WEIGHT = np.linspace(-1, 1, 4 * 3 * 9, dtype=np.float32).reshape(4, 3, 3, 3) ** 3
WIDE_WEIGHT = np.linspace(-3, 2, 2 * 4 * 3 * 3, dtype=np.float32).reshape(2, 4, 3, 3)
GEMM_WEIGHT = np.array([[0.5, -1.0], [2.0, 0.25], [-0.75, 0.125]], np.float32)

# Native shape, channel and block axis; gemm.weight is stored (in, out).
GEOMETRIES = {
    "conv.weight": TensorGeometry((4, 3, 3, 3), 0, 1),
    "conv.bias": TensorGeometry((4,), 0),
    "block.weight": TensorGeometry((2, 4, 3, 3), 0, 1),
    "fc.weight": TensorGeometry((2, 8), 0, 1),
    "gemm.weight": TensorGeometry((3, 2), 1, 0),
    "strict.weight": TensorGeometry((2, 8), 0, 1),
    "half.weight": TensorGeometry((2, 2), 0, 1),
}
ACTIVATION_SPECS = {
    "input": QuantSpec(8, signed=False, symmetric=False),
    "relu": QuantSpec(16, signed=False, symmetric=False),
    "tanh": QuantSpec(8),
    "sigmoid": QuantSpec(8, unsigned_symmetric=True),
}
PARAMETER_SPECS = {
    "conv.weight": QuantSpec(8, granularity=PerChannel(0)),
    "block.weight": QuantSpec(4, granularity=Blockwise(0, 1, 2)),
    "fc.weight": QuantSpec(4, granularity=Blockwise(0, 1, 2, 8)),
    "gemm.weight": QuantSpec(8, granularity=PerChannel(0)),
    "strict.weight": QuantSpec(8, strict=True),
}
RANGES = {"input": (-1.0, 2.0), "relu": (0.0, 1.60632), "tanh": (-1.0, 2.0), "sigmoid": (0.0, 1.0)}


def cnn_encodings() -> dict[str, Encoding]:
    """Encodings by tensor name, in native axes."""
    table = {name: encoding_from_range(spec, *RANGES[name]) for name, spec in ACTIVATION_SPECS.items()}
    weights = {
        "conv.weight": CONV_WEIGHT,
        "block.weight": WIDE_WEIGHT,
        "fc.weight": LPBQ_WEIGHT,
        "gemm.weight": GEMM_WEIGHT.T,
        "strict.weight": LPBQ_WEIGHT,
    }
    for name, weight in weights.items():
        table[name] = encoding_of_weights(weight, PARAMETER_SPECS[name])
    table["gemm.weight"] = permute(table["gemm.weight"], (1, 0))
    bias_scale = table["input"].scale * table["conv.weight"].scale
    table["conv.bias"] = Encoding(32, True, True, bias_scale, np.zeros(4, np.int32), PerChannel(0))
    table["half.weight"] = encoding_of_weights(np.ones((2, 2), np.float32), QuantSpec(16, float_format="float16"))
    return table


def cnn_file() -> EncodingsFile:
    """The file of these."""
    table = cnn_encodings()
    return EncodingsFile(
        {n: unbind(table[n]) for n in ACTIVATION_SPECS},
        {n: unbind(e, GEOMETRIES[n].shape) for n, e in table.items() if n not in ACTIVATION_SPECS},
        producer={"package": "bitwright", "version": "0.1.0"},
        quantizer_args={"activation_bitwidth": 8, "quant_scheme": "min_max"},
        excluded_layers=("head",),
        provenance=(Provenance("adaround", {"iterations": 100}, "f00d"),),
    )
