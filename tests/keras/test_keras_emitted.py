"""Keras models as ONNX, by the canonical graph: what is written, against Keras's own numbers."""

# ruff: noqa: PLW0108

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops
from keras_layers import CASES, NOT_EXPORTED, NOT_OPENED, model_of
from shares import one_of_each_rank

pytest.importorskip("onnx_ir")

from bitwright import QuantSim
from bitwright_keras.backend import KerasBackend
from bitwright_keras.export.complete import complete
from bitwright_keras.export.export import as_onnx
from bitwright_onnx.adapters import NotEmittable, written_graph
from bitwright_onnx.backend import OnnxBackend

BACKEND, ONNX = KerasBackend(), OnnxBackend()


@pytest.mark.parametrize("name", one_of_each_rank(set(CASES) - set(NOT_OPENED)))
def test_which_layers_are_written(name: str) -> None:
    """`as_onnx` compares every tensor with Keras's own."""
    model = BACKEND.adopt(model_of(name)[0])
    if name not in NOT_EXPORTED:
        as_onnx(model)
        return
    with pytest.raises(NotEmittable, match="doesn't say what it computes"):
        as_onnx(model)


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
     "MultiHeadAttention", "Concatenate", "Dot", "Embedding", "Rescaling", "Dropout", "LSTM", "Pipeline"],
)  # fmt: skip
def test_each_site_has_its_pair(name: str, tmp_path: Any) -> None:
    model, data = model_of(name) if name else network()
    sim = QuantSim(model, target="onnxruntime-cpu").calibrate([data])
    found = ONNX.pairs(BACKEND.export(sim.native, sim.plan, sim.state.table, tmp_path / "net.onnx", "qdq"))
    sites = [site for site in sim.plan.quantized if site in sim.encodings]
    assert sites
    for site in sites:
        (pair,), encoding = found[site], sim.encodings[site]
        assert (pair.bits, pair.signed) == (encoding.bits, encoding.signed)
        np.testing.assert_array_equal(np.ravel(pair.scale), np.ravel(encoding.scale))


def one(call: Any, *shape: int, dtype: str = "float32") -> keras.Model:
    x = keras.Input(shape, dtype=dtype, name="x")
    return keras.Model(x, call(x), name="net")


OPS = {
    "items": lambda x: x[:, 1:5:2, ..., 0],
    "the last row": lambda x: x[:, -1],
    "strides": lambda x: ops.flip(x, axis=1)[..., ::2],
    "slice": lambda x: ops.slice(x, (0, 1, 0, 2), (2, 3, 6, 2)),
    "one minus": lambda x: 1.0 - x,
    "mod": lambda x: ops.mod(x, 0.75) + ops.mod(2.5, ops.square(x) + 1.5),
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
    keras.utils.set_random_seed(3)
    as_onnx(BACKEND.adopt(one(OPS[name], 6, 6, 4)))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: L.MaxPooling2D(3, 2, padding="same")(L.Conv2D(4, 3, strides=2, padding="same", activation="relu")(x)),
        lambda x: L.AveragePooling2D(2, padding="same")(L.DepthwiseConv2D(3, strides=2, padding="same")(x)),
        lambda x: L.GlobalAveragePooling2D()(L.Conv2DTranspose(3, 3, strides=2, padding="same")(x)),
    ],
    ids=["conv", "depthwise", "transposed"],
)
def test_images_of_any_size(call: Any) -> None:
    as_onnx(BACKEND.adopt(one(call, None, None, 4)))


MASKED = {
    "gru": lambda x: L.GRU(4, return_sequences=True)(x),
    "backwards": lambda x: L.SimpleRNN(4, go_backwards=True)(x),
    "both": lambda x: L.Bidirectional(L.LSTM(4))(x),
    "stacked": lambda x: L.RNN([L.LSTMCell(4), L.GRUCell(3)], return_sequences=True, return_state=True)(x),
    "zeros": lambda x: L.RNN(L.LSTMCell(4), return_sequences=True, zero_output_for_mask=True)(x),
    "attention": lambda x: L.Attention()([x, x]),
    "each": lambda x: L.TimeDistributed(L.Dense(3, activation="tanh"))(x),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_steps_are_left_out(name: str) -> None:
    """On steps that are masked: their zeros at the end, and one between."""
    keras.utils.set_random_seed(4)
    model = BACKEND.adopt(one(lambda x: MASKED[name](L.Masking()(x)), 6, 4))
    x = np.random.default_rng(5).normal(size=(3, 6, 4)).astype(np.float32)
    x[0, 4:], x[1, 2] = 0, 0
    graph, values = complete(model)
    own = BACKEND.graph(model).tensors
    written_graph(graph, values, lambda taps: BACKEND.session(model, taps), sample={"x": x}, tensors=own)


def test_the_weights_written_are_those_of_now() -> None:
    """Layers in which nothing is a parameter may have been trained since the graph was made."""
    each = L.TimeDistributed(L.EinsumDense("bc,cd->bd", 4))
    model = BACKEND.adopt(one(lambda x: L.Dense(2)(L.LSTM(3)(each(x))), 5, 4))
    as_onnx(model)
    for layer in model.layers:
        for variable in layer.variables:
            variable.assign(variable + 0.5)
    as_onnx(model)
