"""QDQ files from the canonical graph: which layers say all that they compute; the frozen graph gives the same files."""

# ruff: noqa: PLW0108

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops
from keras_layers import CASES, NOT_OPENED, model_of

pytest.importorskip("onnx_ir")

from bitwright import QuantSim
from bitwright.graph import lacking
from bitwright_keras.backend import KerasBackend
from bitwright_keras.export.export import _frozen_qdq
from bitwright_onnx.adapters import export_qdq, written
from bitwright_onnx.backend import OnnxBackend

BACKEND, ONNX = KerasBackend(), OnnxBackend()

FROM_THE_FROZEN_GRAPH = {
    **dict.fromkeys(
        ("LSTM", "GRU", "SimpleRNN", "Bidirectional", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "RNN", "LSTMCell",
         "GRUCell", "SimpleRNNCell", "StackedRNNCells", "Masking"),
        "its cells lie otherwise than ONNX's",
    ),
    **dict.fromkeys(
        (f"Adaptive{kind}Pooling{rank}D" for kind in ("Average", "Max") for rank in (1, 2, 3)),
        "its windows differ in size",
    ),
    **dict.fromkeys(("Attention", "AdditiveAttention"), "a layer that isn't spelled out"),
    "RepeatVector": "ONNX takes two ops for it",
    "CategoryEncoding": "counts",
    "Discretization": "finds buckets",
    "Hashing": "ONNX has no hashes",
    "HashedCrossing": "ONNX has no hashes",
    "IntegerLookup": "ONNX has no lookup tables",
    "Lambda": "code of the user's",
    "TimeDistributed": "code of another layer",
    "SpectralNormalization": "code of another layer",
    "Pipeline": "code of other layers",
    "ReversibleEmbedding": "a product or a lookup, as it is called",
    **dict.fromkeys(
        ("MelSpectrogram", "STFTSpectrogram", "AutoContrast", "Solarization", "RandomCrop",
         "ContrastLimitedAdaptiveHistogramEqualization"),
        "a layer that isn't spelled out",
    ),
}  # fmt: skip
"""Layers whose QDQ files come from TensorFlow's graph, and why. This list may only shrink."""


@pytest.mark.parametrize("name", sorted(set(CASES) - set(NOT_OPENED)))
def test_which_layers_say_all_that_they_compute(name: str) -> None:
    graph = BACKEND.graph(BACKEND.adopt(model_of(name)[0]))
    silent = {op.id: reason for op in graph if (reason := lacking(op, graph)) is not None}
    assert bool(silent) == (name in FROM_THE_FROZEN_GRAPH), silent


def same(found: Any, expected: Any) -> bool:
    pairs = [(p.bits, p.signed, p.float_format, *map(np.ravel, (p.scale, p.zero_point))) for p in (found, expected)]
    for a, b in zip(*pairs, strict=True):
        if not np.array_equal(a, b):
            return False
    return found.codes is None or np.array_equal(np.ravel(found.codes()), np.ravel(expected.codes()))


def network() -> tuple[keras.Model, dict[str, np.ndarray]]:
    """What stands between layers with weights."""
    keras.utils.set_random_seed(1)
    x = keras.Input((12, 12, 3), name="x")
    y = L.MaxPooling2D(3, 2, padding="same")(L.Conv2D(4, 3, strides=2, padding="same", activation="relu")(x))
    y = L.UpSampling2D(2)(L.ZeroPadding2D(((1, 0), (0, 2)))(y))
    y = L.AveragePooling2D(2)(L.DepthwiseConv2D(3, activation="relu6")(y))
    y = L.Add()([y, L.Conv2D(4, 1, activation="silu")(y)])
    y = L.Dense(5, activation="softmax")(L.Dropout(0.5)(L.GlobalAveragePooling2D()(y)))
    return keras.Model(x, y, name="network"), {"x": np.random.default_rng(0).normal(size=(8, 12, 12, 3)).astype("f4")}


@pytest.mark.parametrize(
    "name",
    ["", "Conv2D", "Conv2DTranspose", "DepthwiseConv2D", "PReLU", "BatchNormalization", "LayerNormalization",
     "MultiHeadAttention", "Concatenate", "Dot", "Embedding", "Rescaling", "Dropout"],
)  # fmt: skip
def test_both_ways_give_the_same_pairs(name: str, tmp_path: Any) -> None:
    model, data = model_of(name) if name else network()
    sim = QuantSim(model, target="onnxruntime-cpu").calibrate([data])
    arguments = sim.native, sim.plan, sim.state.table
    found = export_qdq(BACKEND, *arguments, tmp_path / "graph.onnx")
    expected = _frozen_qdq(*arguments, tmp_path / "frozen.onnx")
    pairs, others = ONNX.pairs(found), ONNX.pairs(expected)
    assert pairs
    assert set(pairs) == set(others)
    for site, held in pairs.items():
        assert len(held) == len(others[site]) == 1
        assert same(held[0], others[site][0]), site
    assert expected.names.items() <= found.names.items()
    passed = {site: name for site, name in found.names.items() if site not in expected.names}
    assert set(passed) <= {op.output for op in sim.graph if op.type in ("Dropout", "Identity")}


def one(call: Any, *shape: int, dtype: str = "float32") -> keras.Model:
    x = keras.Input(shape, dtype=dtype, name="x")
    return keras.Model(x, call(x), name="net")


OPS = {
    "items": lambda x: x[:, 1:5:2, ..., 0],
    "the last row": lambda x: x[:, -1],
    "strides": lambda x: ops.flip(x, axis=1)[..., ::2],
    "slice": lambda x: ops.slice(x, (0, 1, 0, 2), (2, 3, 6, 2)),
    "one minus": lambda x: 1.0 - x,
    "divided": lambda x: 3 / (ops.square(x) + 1.5),
    "root": lambda x: ops.rsqrt(ops.abs(x) + 1),
    "where": lambda x: ops.where(x > 0.5, x, -1.0),
    "masked": lambda x: ops.where(ops.logical_and(x > 0, ops.logical_not(x >= 1)), x, 0.0),
    "norm": lambda x: ops.norm(x, axis=-1, keepdims=True),
    "largest": lambda x: ops.amax(x, axis=(1, 2)),
    "log of sums": lambda x: ops.logsumexp(x, axis=1),
    "running sum": lambda x: ops.cumsum(x, axis=2),
    "einsum": lambda x: ops.einsum("bhwc,bhwd->bhcd", x, x),
    "stack": lambda x: ops.stack([x, ops.relu(x)], axis=1),
    "unstack": lambda x: ops.unstack(x, axis=1)[2],
    "split": lambda x: ops.split(x, [1, 3], axis=-1)[1],
    "swap": lambda x: ops.swapaxes(x, 1, 3),
    "move": lambda x: ops.moveaxis(x, 3, 1),
    "take": lambda x: ops.take(x, [2, 0], axis=1),
    "repeat": lambda x: ops.repeat(x, 3, axis=2),
    "tile": lambda x: ops.tile(x, (1, 2, 1, 1)),
    "pad": lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 0), (0, 1)), constant_values=0.5),
    "reflect": lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 0), (0, 1)), mode="reflect"),
    "elu": lambda x: L.ELU(0.4)(x),
    "gelu by tanh": lambda x: ops.gelu(x),
    "gelu": lambda x: ops.gelu(x, approximate=False),
    "soft shrink": lambda x: ops.soft_shrink(x, 0.3),
    "hard shrink": lambda x: L.Activation("hard_shrink")(x),
    "threshold": lambda x: L.ReLU(threshold=0.5)(x),
    "bilinear": lambda x: L.UpSampling2D(2, interpolation="bilinear")(x),
    "odd sizes": lambda x: L.Resizing(9, 4, interpolation="nearest")(x),
    "two axes": lambda x: L.LayerNormalization(axis=(2, 3))(x),
    "instance norm": lambda x: L.GroupNormalization(groups=-1)(x),
    "channels of bn": lambda x: L.BatchNormalization(axis=1, scale=False)(x),
    "depth to space": lambda x: ops.depth_to_space(x, 2),
    "channels first": lambda x: L.MaxPooling2D(2, data_format="channels_first")(ops.transpose(x, (0, 3, 1, 2))),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_operations_compute_the_same(name: str) -> None:
    """`written` compares every tensor."""
    keras.utils.set_random_seed(3)
    written(BACKEND, BACKEND.adopt(one(OPS[name], 6, 6, 4)))
