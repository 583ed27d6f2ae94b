"""The normal form: what is spelled out, how it is named, what stays opaque, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

keras = pytest.importorskip("keras")

import keras_nets as nets  # noqa: E402
from keras import layers as L  # noqa: E402
from keras import ops  # noqa: E402

from bitwright.backend import Tap  # noqa: E402
from bitwright.errors import InputError, ModelError  # noqa: E402
from bitwright.graph import ConvAttrs, OpKind, ParamRole  # noqa: E402
from bitwright.testing.contract_base import run  # noqa: E402
from bitwright.verify import validate  # noqa: E402
from bitwright_keras.backend import KerasBackend  # noqa: E402
from bitwright_keras.capture.normalize import CaptureNotice  # noqa: E402
from bitwright_keras.graph.native import keras_model  # noqa: E402

BACKEND = KerasBackend()
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def equal(model, x, sample=None, tolerance=1e-5):
    """The normal form, after checking that it and the plain Keras model made of it compute what the model does."""
    found = BACKEND.adopt(model, sample)
    expected = [ops.convert_to_numpy(v) for v in keras.tree.flatten(model(x, training=False))]
    batch = dict(zip(found.inputs, keras.tree.flatten(x), strict=True))
    values = run(BACKEND.session(found, [Tap(t) for t in found.output_ids]), batch)
    again = keras_model(found)(x, training=False)
    keras.tree.assert_same_structure(again, model(x, training=False))
    for value, other, wanted in zip(values.values(), keras.tree.flatten(again), expected, strict=True):
        for tensor in (value, ops.convert_to_numpy(other)):
            np.testing.assert_allclose(tensor, wanted, rtol=1e-4, atol=tolerance * np.abs(wanted).max())
    return found


def test_names_are_the_user_s() -> None:
    found = equal(nets.settled(nets.separable()), normal(3, 6, 6, 3))
    graph = BACKEND.graph(found)
    assert [op.id for op in graph][:7] == [
        "sep/depthwise", "sep", "sep/relu", "block/conv", "block/leaky", "shared", "shared/relu",
    ]  # fmt: skip
    assert graph.op("shared_1").params == graph.op("shared").params
    assert graph.op("sep").params == {ParamRole.WEIGHT: "sep/pointwise_kernel", ParamRole.BIAS: "sep/bias"}
    depthwise = graph.op("sep/depthwise")
    assert graph.params["sep/depthwise_kernel"].shape == (6, 1, 3, 3)
    assert isinstance(depthwise.attrs, ConvAttrs)
    assert depthwise.attrs.groups == 3


def test_attention_is_dense_layers_and_products() -> None:
    ids = RNG.integers(1, 20, (3, 7)).astype(np.int32)
    ids[0, 5:] = 0
    found = equal(nets.settled(nets.transformer()), ids)
    graph = BACKEND.graph(found)
    assert graph.params["mha/query/kernel"].shape == (8, 8)
    assert {graph.op(f"mha/{n}").kind for n in ("query", "key", "value", "attention_output")} == {OpKind.LINEAR}
    assert graph.op("mha/scores").kind is graph.op("mha/context").kind is OpKind.MATMUL
    softmax = graph.op("mha/softmax")
    assert softmax.kind is OpKind.SOFTMAX
    assert softmax.data_inputs == ("mha/masked",)
    assert graph.tensors["mha/masked"].mask  # masked scores are no values for a grid
    assert not graph.tensors["mha/scores"].mask


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_attention_masks(causal: bool, dropout: float) -> None:
    q, v, m = keras.Input((5, 6), name="q"), keras.Input((7, 4), name="v"), keras.Input((5, 7), dtype="bool", name="m")
    width = 3 if keras.backend.backend() == "jax" else 4  # Keras's attention on JAX takes no other than key_dim
    y = L.MultiHeadAttention(2, 3, value_dim=width, output_shape=5, dropout=dropout, name="mha")(
        q, v, attention_mask=m, use_causal_mask=causal
    )
    equal(keras.Model([q, v, m], y), [normal(2, 5, 6), normal(2, 7, 4), RNG.random((2, 5, 7)) > 0.4])


@pytest.mark.parametrize("steps", [5, None])
@pytest.mark.parametrize("called", [{}, {"use_causal_mask": True}, {"return_attention_scores": True, "masked": True}])
@pytest.mark.parametrize("settings", [{}, {"sliding_window": 2}, {"use_gate": True, "dropout": 0.1}])
@pytest.mark.parametrize("grouped", [False, True])
def test_attention_of_every_kind_is_spelled_out(steps, called, settings, grouped) -> None:
    """Keras's two attention layers with gates, windows and scores, over fixed and free numbers of steps."""
    x, m = keras.Input((steps, 6), name="x"), keras.Input((steps, steps), dtype="bool", name="m")
    layer = (
        L.GroupQueryAttention(4, 6, 2, name="a", **settings)
        if grouped
        else L.MultiHeadAttention(2, 3, name="a", **settings)
    )
    called = dict(called)
    inputs, given = x, normal(2, 5, 6)
    if called.pop("masked", False):
        called["attention_mask"] = m
        inputs, given = [x, m], [given, RNG.random((2, 5, 5)) > 0.4]
    y = layer(x, x, **called)
    model = nets.settled(keras.Model(inputs, list(y) if isinstance(y, tuple) else y))
    graph = BACKEND.graph(equal(model, given))
    assert graph.unknown_ops == () or {op.native for op in graph.unknown_ops} == {"Cast operation"}
    assert {graph.op(f"a/{n}").kind for n in ("query", "key", "value", "attention_output")} == {OpKind.LINEAR}
    assert graph.params["a/key/kernel"].shape == ((8, 6) if grouped else (6, 6))
    assert ("a/gate" in {op.id for op in graph}) is bool(settings.get("use_gate"))


def test_subclassed_models_are_captured_through_call() -> None:
    x = normal(3, 8, 8, 3)
    model = nets.Subclassed()
    model(x)
    nodes = len(model.conv._inbound_nodes)
    with pytest.warns(CaptureNotice, match="shift"):
        found = equal(nets.settled(model), x)
    assert len(model.conv._inbound_nodes) == nodes
    graph = BACKEND.graph(found)
    assert [op.id for op in graph][:3] == ["conv", "conv/relu", "norm"]
    assert graph.op("conv").params[ParamRole.WEIGHT] == "conv/kernel"


class Remembers(L.Layer):
    """Keeps what it computed last, and the positions of each width, on itself and on its class."""

    positions = {}  # noqa: RUF012 - a cache, as people write them

    def __init__(self, **options):
        super().__init__(**options)
        self.dense, self.last, self.widths = L.Dense(4), None, {}

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, x):
        width = x.shape[-1]
        if width not in self.positions:
            self.positions[width] = self.widths[width] = ops.ones_like(x) * 0.5
        self.last = self.dense(x) * ops.mean(self.positions[width])
        return self.last


def test_layers_that_remember_are_left_as_they_were() -> None:
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = Remembers()

        def build(self, shape):
            self.inner.build(shape)
            self.built = True

        def call(self, x):
            return ops.relu(self.inner(x))

    x = normal(3, 6)
    model = Net()
    model.build((None, 6))
    for _ in range(2):
        equal(model, x, sample=x)
        assert model.inner.last is None or not isinstance(model.inner.last, keras.KerasTensor)
        assert not any(isinstance(v, keras.KerasTensor) for v in (*Remembers.positions.values(), *model.inner.widths))


@pytest.mark.filterwarnings("ignore:variable 'subclassed/shift', which:bitwright_keras.CaptureNotice")
def test_an_unbuilt_model_needs_a_sample() -> None:
    with pytest.raises(ModelError, match=r"never called|sample batch"):
        BACKEND.adopt(nets.Subclassed())
    with pytest.raises(ModelError, match="sample"):
        BACKEND.adopt(keras.Sequential([L.Dense(3)]))
    model = nets.Subclassed()
    x = normal(2, 8, 8, 3)
    assert BACKEND.graph(BACKEND.adopt(model, x)).inputs
    assert BACKEND.graph(BACKEND.adopt(keras.Sequential([L.Dense(3)]), normal(2, 4))).linear_ops


class Branching(keras.Model):
    def __init__(self):
        super().__init__(name="branching")
        self.fc = L.Dense(3)

    def call(self, x):
        y = self.fc(x)
        return y if ops.convert_to_numpy(ops.sum(y)) > 0 else -y


class Stateful(keras.Model):
    def __init__(self):
        super().__init__(name="stateful")
        self.fc, self.calls = L.Dense(3), 0

    def call(self, x):
        self.calls += 1
        return self.fc(x) * float(self.calls)


@pytest.mark.parametrize(("make", "message"), [(Branching, "branching.*keras.ops only"), (Stateful, "Python state")])
def test_calls_that_can_t_be_captured_are_refused(make, message: str) -> None:
    model = make()
    model(normal(2, 4))
    with pytest.raises(ModelError, match=message):
        BACKEND.adopt(model, normal(2, 4))


def test_custom_layers_of_layers_are_looked_into_and_others_are_opaque() -> None:
    x = keras.Input((7, 6), name="x")
    y = nets.Scale(name="scale")(nets.Block(6, name="blk")(x))
    y = L.LSTM(5, name="lstm")(L.Lambda(lambda t: t * 2, name="lam")(y))
    model = keras.Model(x, y)
    found = equal(model, normal(2, 7, 6))
    graph = BACKEND.graph(found)
    assert graph.op("blk/up").kind is OpKind.LINEAR
    assert {op.id for op in graph if op.kind is OpKind.OPAQUE} == {"scale", "lam", "lstm"}
    told = str(validate(model))
    for name in ("Scale layer", "Lambda layer", "LSTM layer"):
        assert name in told


def test_everything_else_computes_the_same() -> None:
    a, b = keras.Input((12, 4), name="a"), keras.Input((6, 8), name="b")
    y = L.SeparableConv1D(8, 3, padding="same", activation="gelu")(a)
    y = L.PReLU(shared_axes=[1])(L.Conv1D(8, 3, padding="causal", dilation_rate=2)(y))
    y = L.Conv1DTranspose(8, 3, strides=2)(L.MaxPooling1D(2)(y))[:, :6]
    y = L.Average()([L.Multiply()([y, b]), b, L.Rescaling(0.5, offset=1.0)(b)])
    y = y - ops.max(y, axis=-1, keepdims=True)
    z = L.EinsumDense("abc,cd->abd", output_shape=(6, 7), bias_axes="d", activation="relu")(y)
    z = L.TimeDistributed(L.Dense(3, activation="tanh"))(L.Permute((2, 1))(z))
    z = ops.concatenate([z, ops.softmax(z) / 3.0], axis=-1)
    model = keras.Model({"a": a, "b": b}, {"p": y, "q": [z, L.Flatten()(z)]})
    equal(model, {"a": normal(2, 12, 4), "b": normal(2, 6, 8)})


@pytest.mark.filterwarnings("ignore:Layer 'einsum_dense.*does not support masking:UserWarning")
@pytest.mark.parametrize(
    "build",
    [
        lambda e, plain: L.Attention()([e, e]),
        lambda e, plain: L.AdditiveAttention()([plain, e]),
        lambda e, plain: L.LSTM(3)(L.Concatenate()([e, plain])),
        lambda e, plain: L.GlobalAveragePooling1D()(
            L.EinsumDense("abc,cd->abd", output_shape=(None, 5), bias_axes="d", activation="relu")(e)
        ),
    ],
    ids=["attention", "additive", "concatenate", "einsum"],
)
def test_masks_reach_what_keras_hands_them_to(build) -> None:
    ids = np.array([[1, 2, 0, 0], [3, 0, 0, 0]], np.int32)
    x = keras.Input((4,), dtype="int32", name="x")
    e, plain = L.Embedding(10, 6, mask_zero=True)(x), L.Embedding(10, 6)(x)
    equal(nets.settled(keras.Model(x, build(e, plain))), ids)


def test_shared_layers_are_called_over_several_lengths() -> None:
    a, b = keras.Input((4, 6), name="a"), keras.Input((7, 6), name="b")
    attention = L.MultiHeadAttention(2, 3)
    split = L.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3), bias_axes="de")
    y = [L.Concatenate(axis=1)([attention(a, a), attention(b, b)]), L.Concatenate(axis=1)([split(a), split(b)])]
    equal(nets.settled(keras.Model([a, b], y)), [normal(2, 4, 6), normal(2, 7, 6)])


def test_volumes_and_channels_first() -> None:
    x = keras.Input((4, 6, 6, 3), name="x")
    y = L.Conv3D(4, 3, padding="same", strides=2, activation="elu")(x)
    y = L.Conv3DTranspose(3, 2, strides=2)(L.GroupNormalization(2)(y))
    equal(keras.Model(x, L.UpSampling3D(2)(L.AveragePooling3D(2)(y))), normal(2, 4, 6, 6, 3))
    if keras.backend.backend() == "torch":  # TensorFlow has no kernels for it on a CPU
        x = keras.Input((3, 8, 8), name="x")
        y = L.BatchNormalization(axis=1)(L.Conv2D(4, 3, data_format="channels_first", name="conv")(x))
        found = equal(keras.Model(x, y), normal(2, 3, 8, 8))
        assert BACKEND.graph(found).tensors["conv"].channel_axis == 1


def test_strided_same_padding_over_free_sizes_is_opaque() -> None:
    x = keras.Input((None, None, 3), name="x")
    y = L.Conv2D(4, 3, padding="same", name="plain")(L.Conv2D(4, 3, strides=2, padding="same", name="strided")(x))
    graph = BACKEND.graph(equal(keras.Model(x, y), normal(2, 9, 9, 3)))
    assert graph.op("strided").kind is OpKind.OPAQUE
    assert graph.op("plain").kind is OpKind.CONV


def test_a_shared_layer_takes_a_bias_at_each_call() -> None:
    from bitwright.graph import SetBias

    found = BACKEND.adopt(nets.settled(nets.separable()))
    values = {"shared": np.arange(6, dtype=np.float32), "shared_1": -np.arange(6, dtype=np.float32)}
    edited = BACKEND.edit(found, [SetBias(op, value) for op, value in values.items()])
    graph = BACKEND.graph(edited)
    assert graph.op("shared").weight == graph.op("shared_1").weight == "shared/kernel"
    for op, value in values.items():
        bias = graph.op(op).params[ParamRole.BIAS]
        assert np.array_equal(BACKEND.read(edited, [bias])[bias], value)
    x = normal(2, 6, 6, 3)
    (y,) = run(BACKEND.session(edited, [Tap(edited.output_ids[0])]), {"x": x}).values()
    np.testing.assert_allclose(ops.convert_to_numpy(keras_model(edited)(x)), y, rtol=1e-5)


def test_what_is_no_model_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="not a Keras model"):
        BACKEND.adopt({"x": 1})
    with pytest.raises(InputError, match="no file"):
        BACKEND.load(tmp_path / "absent.keras")
    (tmp_path / "bad.keras").write_bytes(b"hello")
    (tmp_path / "bad.h5").write_bytes(b"hello")
    for name in ("bad.keras", "bad.h5"):
        with pytest.raises(InputError, match="can't be opened"):
            BACKEND.load(tmp_path / name)
    with pytest.raises(InputError, match="knows no option"):
        BACKEND.load(tmp_path / "bad.h5", threads=2)
    with pytest.raises(InputError, match=r"\.keras or \.h5"):
        BACKEND.save(BACKEND.adopt(nets.residual()), tmp_path / "model.onnx")


def test_a_first_call_that_fails_is_told() -> None:
    class Net(keras.Model):
        def build(self, shape):
            self.built = True

        def __init__(self):
            super().__init__()
            self.dense = L.Dense(4)

        def call(self, x):
            raise RuntimeError("no such file")

    with pytest.raises(ModelError, match="on the sample fails: no such file"):
        BACKEND.adopt(Net(), normal(3, 6))


@pytest.mark.parametrize("inner", [lambda: L.Dense(5, activation="relu"), lambda: L.Dense(5)])
def test_spectral_normalization_is_the_layer_inside(inner) -> None:
    x = keras.Input((6,), name="x")
    model = nets.settled(keras.Model(x, L.Dense(3, name="head")(L.SpectralNormalization(inner(), name="sn")(x))))
    graph = BACKEND.graph(equal(model, normal(3, 6)))
    assert graph.unknown_ops == () and graph.op("sn").kind is OpKind.LINEAR
    assert graph.params["sn/kernel"].shape == (5, 6)
