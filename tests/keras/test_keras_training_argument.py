"""Layers whose `call` has more than a tensor: `training` in all its ways, keyword-only arguments, several tensors.

What is captured is what the model computes in inference, or it is refused by the layer's name.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

keras = pytest.importorskip("keras")

from keras import layers as L  # noqa: E402
from keras import ops  # noqa: E402

from bitwright.backend import Tap  # noqa: E402
from bitwright.errors import ModelError  # noqa: E402
from bitwright.graph import OpKind  # noqa: E402
from bitwright.testing.contract_base import run  # noqa: E402
from bitwright_keras.backend import KerasBackend  # noqa: E402
from bitwright_keras.capture.comparing import CaptureNotice  # noqa: E402
from bitwright_keras.graph.native import keras_model  # noqa: E402

# Models called as their authors do, layers without build(): Keras has something to say of both.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(?s).*The structure of `inputs` doesn't match:UserWarning"),
    pytest.mark.filterwarnings("ignore:`build\\(\\)` was called on layer:UserWarning"),
]
BACKEND = KerasBackend()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 8)).astype(np.float32)


class Parts(L.Layer):
    """Dropout and batch norm inside; no build() and no names, as guides write it."""

    def __init__(self, units=5, **options):
        super().__init__(**options)
        self.units, self.dense = units, L.Dense(units)
        self.drop, self.norm = L.Dropout(0.5), L.BatchNormalization()

    def call(self, x, training=None):
        return self.norm(self.drop(self.dense(x), training=training), training=training)


class ByDefaultTrue(Parts):
    def call(self, x, training=True):
        return self.norm(self.drop(self.dense(x), training=training), training=training)


class ByDefaultFalse(Parts):
    def call(self, inputs, training=False):
        return self.norm(self.drop(self.dense(inputs), training=training))


class Silent(Parts):
    """The layers inside inherit what the layer around it was called with."""

    def call(self, x):
        return self.norm(self.drop(self.dense(x)))


class Keywords(Parts):
    def call(self, x, *, factor=2.0, mode="scaled", mask=None, training=False):
        return self.dense(x) * factor if mode == "scaled" else self.dense(x)


class TwoTensors(Parts):
    def call(self, a, b, scale=1.0):
        return self.dense(a) * scale + b[:, : self.units]


class OwnWeight(Parts):
    """A weight of its own, so that it stays one op; made after the layers inside."""

    def build(self, shape):
        self.shift = self.add_weight(shape=(self.units,), initializer="random_normal")

    def call(self, x, training=True):
        return (self.dense(x) + self.shift) * (2.0 if training else 1.0)


class Nested(L.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.first, self.second = Parts(6), ByDefaultTrue(4)

    def call(self, x, training=None):
        return self.second(self.first(x, training=training), training=training)


def drawn(model):
    for variable in model.variables:
        if str(variable.dtype).startswith("float"):
            variable.assign(0.1 + np.abs(RNG.normal(size=tuple(variable.shape))))
    return model


def functional(call, inputs=1):
    given = [keras.Input((8,), name=f"x{i}") for i in range(inputs)]
    return drawn(keras.Model(given, L.Dense(3, name="head")(call(*given))))


def check(model, x, sample=None):
    expected = ops.convert_to_numpy(model(x, training=False))
    before = [np.array(v.value) for v in model.variables]
    found = BACKEND.adopt(model, sample)
    assert all(np.array_equal(a, np.array(v.value)) for a, v in zip(before, model.variables, strict=True))
    batch = dict(zip(found.inputs, keras.tree.flatten(x), strict=True))
    (value,) = run(BACKEND.session(found, [Tap(t) for t in found.output_ids]), batch).values()
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ops.convert_to_numpy(keras_model(found)(x, training=False)), expected, rtol=1e-5)
    return BACKEND.graph(found)


@pytest.mark.parametrize("kind", [Parts, ByDefaultTrue, ByDefaultFalse, Silent, Keywords, Nested])
def test_custom_layers_in_functional_models(kind) -> None:
    graph = check(functional(kind()), X)
    assert all(op.kind is not OpKind.OPAQUE for op in graph)


@pytest.mark.parametrize("given", [None, False, True])
def test_what_a_functional_model_hands_on_overrides_what_was_recorded(given) -> None:
    check(functional(lambda x: Parts()(x, training=given)), X)
    check(functional(lambda x: L.Dropout(0.5)(x, training=given)), X)


@pytest.mark.parametrize("options", [{"factor": 3.5}, {"factor": 3.5, "mode": "plain"}])
def test_settings_given_by_keyword(options) -> None:
    check(functional(lambda x: Keywords()(x, **options)), X)


def test_two_tensors_by_place_and_by_keyword() -> None:
    x = [X, X[::-1].copy()]
    check(functional(lambda a, b: TwoTensors()(a, b, scale=2.5), 2), x)
    check(functional(lambda a, b: TwoTensors()(a, b=b), 2), x)


def test_a_layer_that_stays_one_op_keeps_its_weights_and_its_mode() -> None:
    graph = check(functional(OwnWeight()), X)
    assert [op.kind for op in graph] == [OpKind.OPAQUE, OpKind.LINEAR]


class Subclassed(keras.Model):
    def __init__(self, how):
        super().__init__(name="net")
        self.how, self.parts, self.silent, self.two = how, Parts(6, name="parts"), Silent(6), TwoTensors(3)
        self.base = keras.Sequential([L.Input((6,)), L.Dense(4), L.BatchNormalization(), L.Dropout(0.3)], name="base")
        drawn(self.base)

    def call(self, x, training=None):
        return self.how(self, x, training)


@pytest.mark.parametrize(
    "how",
    [
        lambda net, x, training: net.base(net.parts(x, training=training), training=training),
        lambda net, x, training: net.base(net.parts(x), training=False),
        lambda net, x, training: net.base(net.silent(x)),
        lambda net, x, training: net.two(x, net.parts(x, training=training), scale=3.0),
        lambda net, x, training: net.parts.dense(x, training=True),  # which makes no difference there
    ],
    ids=["handed on", "frozen", "inherited", "two tensors", "without effect"],
)
def test_subclassed_models(how) -> None:
    model = Subclassed(how)
    model(X)
    check(drawn(model), X, X)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (lambda net, x, training: net.base(net.parts(x), training=True), "base/batch_normalization"),
        (lambda net, x, training: net.parts(x, training=True), "parts/dropout"),
        (lambda net, x, training: net.silent(x) if net.parts(x, training=True) is None else 0 * x, ""),
    ],
)
def test_training_mode_in_inference_is_refused_by_name(how, name) -> None:
    model = Subclassed(how)
    model(X)
    if name:
        with pytest.raises(ModelError, match=f"{name}.*training=True"):
            BACKEND.adopt(drawn(model), X)
    else:
        check(drawn(model), X, X)  # what nothing depends on doesn't matter


class Doubled(keras.Model):
    """A functional model with a `call` of its own."""

    def call(self, x, training=None):
        return 2.0 * super().call(x, training=training)


def test_functional_models_with_a_call_of_their_own() -> None:
    x = keras.Input((8,))
    check(drawn(Doubled(x, L.Dense(3)(x))), X)


class Forgetful(L.Layer):
    """Its configuration doesn't tell the factor, so that a copy has another one."""

    def __init__(self, factor=1.0, **options):
        super().__init__(**options)
        self.factor = factor
        self.gain = self.add_weight(shape=(), initializer="ones", name="gain")

    def call(self, x):
        return x * self.factor * self.gain

    def get_config(self):
        return super().get_config()


def test_what_computes_something_else_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"'forgetful'.*get_config"):
        BACKEND.adopt(functional(Forgetful(3.0, name="forgetful")))
    check(functional(Forgetful(name="forgetful")), X)


class Unbuildable(L.Layer):
    """A copy doesn't get the weight that the call needs."""

    def __init__(self, size=None, **options):
        super().__init__(**options)
        self.gain = None if size is None else self.add_weight(shape=(size,), initializer="ones", name="gain")

    def call(self, x):
        return x if self.gain is None else x * self.gain

    def get_config(self):
        return super().get_config()


def test_weights_that_a_copy_lacks_are_refused() -> None:
    with pytest.raises(ModelError, match=r"'lacking'.*0 of its 1 weights"):
        BACKEND.adopt(functional(Unbuildable(8, name="lacking")))


class Sampling(L.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, x):
        return x + keras.random.normal(ops.shape(x), seed=self.seed_generator)


def test_models_that_draw_numbers_open_with_a_notice() -> None:
    model = functional(Sampling())
    model(X)
    with pytest.warns(CaptureNotice, match="random numbers"):
        BACKEND.adopt(model)


def test_a_model_that_no_made_up_numbers_suit_opens_with_a_notice() -> None:
    class Picky(L.Layer):
        def call(self, x):
            if not isinstance(x, keras.KerasTensor):
                assert float(ops.min(x)) > 5, "numbers above 5 only"
            return x

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, x.dtype)

    x = keras.Input((3,), name="x")
    model = keras.Model(x, L.Dense(2)(Picky()(x)))
    with pytest.warns(CaptureNotice, match=r"above 5.*sample"):
        BACKEND.adopt(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureNotice)
        BACKEND.adopt(model, np.full((2, 3), 7.0, np.float32))
