"""Tables of Keras models in which rows are looked up: those of masks stay in float, however they are held; others keep
their grids."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another framework here", allow_module_level=True)

import ml_dtypes  # noqa: E402
from keras import layers as L  # noqa: E402
from keras import ops  # noqa: E402

from bitwright.placement import Float  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import sqnr, verify  # noqa: E402

S, D, N = 12, 16, 24
FUTURE = np.triu(np.ones((S, S), bool), 1)
DATA = {
    "q": np.random.default_rng(0).standard_normal((N, S, D)).astype(np.float32),
    "rows": np.tile(np.arange(S, dtype=np.int32), (N, 1)),
}
VALUES = {
    "-1e4": (-1e4, np.float32),
    "float32's lowest": (float(np.finfo(np.float32).min), np.float32),
    "float16's lowest": (float(np.finfo(np.float16).min), np.float32),
    "float64's lowest": (float(np.finfo(np.float64).min), np.float64),
    "-inf": (-np.inf, np.float32),
}


def triangle(value=-1e4, dtype=np.float32):
    return np.where(FUTURE, value, 0).astype(dtype)


def embedding(values):
    layer = L.Embedding(*values.shape, name="table", dtype=values.dtype.name)
    layer.build()
    layer.set_weights([values])
    return layer


class Table(L.Layer):
    """A variable in which rows are looked up by `ops.take`, or along an axis."""

    def __init__(self, along=False, **kwargs):
        super().__init__(**{"name": "table", **kwargs})
        self.along = along
        self.values = self.add_weight(shape=(S, S), name="values")
        self.values.assign(triangle())

    def get_config(self):
        return {**super().get_config(), "along": self.along}

    def call(self, rows):
        if self.along:
            return ops.take_along_axis(self.values, ops.broadcast_to(rows[0][:, None], (S, S)), 0)
        return ops.take(self.values, rows, axis=0)


def model(offset):
    keras.utils.set_random_seed(1)
    q, rows = L.Input((S, D), name="q"), L.Input((S,), name="rows", dtype="int32")
    k = L.Dense(D, name="k")(q)
    scores = ops.matmul(q, ops.transpose(k, (0, 2, 1))) * D**-0.5
    return keras.Model([q, rows], ops.matmul(ops.softmax(scores + offset(rows), -1), k))


def buckets(rows):
    """One value for each pair of positions, as T5 looks up its biases."""
    later = ops.cast(ops.expand_dims(rows, 1) > ops.expand_dims(rows, 2), "int32")
    return ops.squeeze(embedding(np.float32([[0], [-1e4]]))(later), -1)


def embedded(rows):
    return embedding(triangle())(rows)


def looked_up(rows):
    return Table()(rows)


def looked_up_along_an_axis(rows):
    return Table(along=True)(rows)


FORMS = {
    "embedding": embedded,
    "by the difference": buckets,
    "layer of the user's": looked_up,
    "layer of the user's, along an axis": looked_up_along_an_axis,
    "along an axis": lambda rows: ops.take_along_axis(triangle()[None], ops.expand_dims(rows, -1), 1),
    "bfloat16": lambda rows: ops.cast(ops.take(triangle(-1e4, ml_dtypes.bfloat16), rows, axis=0), "float32"),
    "flags": lambda rows: (1 - embedding((~FUTURE).astype(np.float32))(rows)) * -1e4,
}


def simulated(offset):
    return QuantSim(model(offset)).calibrate(DATA)


class Masked(L.Layer):
    """Scores with a variable added."""

    def __init__(self, **kwargs):
        super().__init__(**{"name": "masked", **kwargs})
        self.values = self.add_weight(shape=(S, S), name="values")
        self.values.assign(triangle())

    def call(self, scores):
        return scores + self.values


def test_a_layer_of_the_users_that_adds_a_mask_keeps_the_scores():
    q = L.Input((S, D), name="q")
    k = L.Dense(D, name="k")(q)
    scores = ops.matmul(q, ops.transpose(k, (0, 2, 1))) * D**-0.5
    sim = QuantSim(keras.Model(q, ops.matmul(ops.softmax(Masked()(scores), -1), k)))
    data = {"q": DATA["q"]}
    sim.calibrate(data)
    assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) > 30


class Sub(keras.Model):
    """A model of the user's with a variable of its own."""

    def __init__(self, take):
        super().__init__(name="sub")
        keras.utils.set_random_seed(1)
        self.k, self.take = L.Dense(D, name="k"), take
        self.values = self.add_weight(shape=(S, S), name="values")
        self.values.assign(triangle())

    def call(self, x):
        k = self.k(x["q"])
        scores = ops.matmul(x["q"], ops.transpose(k, (0, 2, 1))) * D**-0.5
        return ops.matmul(ops.softmax(scores + self.take(self.values, x["rows"])), k)


@pytest.mark.filterwarnings("ignore:.*isn't a layer's own.*")
@pytest.mark.parametrize("along", [False, True])
def test_variables_of_subclassed_models_keep_the_scores(along):
    def take(table, rows):
        if along:
            return ops.take_along_axis(ops.expand_dims(table, 0), ops.expand_dims(rows, -1), 1)
        return ops.take(table, rows, axis=0)

    model, sample = Sub(take), {name: values[:2] for name, values in DATA.items()}
    model(sample)
    assert quality(QuantSim(model, sample).calibrate(DATA)) > 30


def quality(sim):
    return sqnr(sim.predict(DATA, simulated=False)[0], sim.predict(DATA)[0])


@pytest.mark.parametrize("form", FORMS)
def test_looked_up_masks_keep_the_scores(form):
    sim = simulated(FORMS[form])
    assert quality(sim) > 30
    assert form == "flags" or not any("table" in site for site in sim.plan.quantized)
    assert "k/kernel" in sim.plan.quantized


@pytest.mark.filterwarnings("ignore:.*no .h5 is written")
@pytest.mark.parametrize("value", VALUES)
def test_embeddings_of_masks_export(value, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*overflow.*")
        sim = simulated(lambda rows: ops.cast(embedding(triangle(*VALUES[value]))(rows), "float32"))
        assert quality(sim) > 30
        if "64" in value:  # the QDQ file holds float32 numbers: −∞ in its place
            with pytest.warns(UserWarning, match="isn't written: not emittable as ONNX"):
                sim.export(tmp_path, name="net")
        else:
            sim.export(tmp_path, name="net")
            assert verify(tmp_path).problems == []


def test_biases_by_position_keep_their_grid():
    values = np.random.default_rng(2).standard_normal((2 * S, 1)).astype(np.float32) * 8
    values[3] = 200
    sim = simulated(
        lambda rows: ops.squeeze(embedding(values)(ops.expand_dims(rows, 1) - ops.expand_dims(rows, 2) + S), -1)
    )
    assert not any(t.mask for t in sim.graph.tensors.values())
    assert "table/embeddings" in sim.plan.quantized


@pytest.mark.parametrize("read", ["norm", "nothing", "maximum"])
def test_tables_of_words_keep_their_grid(read):
    values = np.random.default_rng(3).standard_normal((50, D)).astype(np.float32)
    values[7, 3] = 1500
    ids = L.Input((S,), name="ids", dtype="int32")
    x = embedding(values)(ids) * 32.0 + L.Embedding(S, D, name="positions")(ids % S)
    if read == "norm":
        x = L.Dense(4, activation="softmax")(L.LayerNormalization()(x))
    sim = QuantSim(keras.Model(ids, ops.max(x, 1) if read == "maximum" else x))
    assert {"table/embeddings", "positions/embeddings"} <= set(sim.plan.quantized)
    assert not any(t.mask for t in sim.graph.tensors.values())


def test_a_table_of_masks_that_is_trained_stays_in_float():
    sim = simulated(FORMS["embedding"])
    trained = sim.trainable()
    trained.compile("sgd", "mse")
    trained.fit(DATA, np.zeros((N, S, D), np.float32), epochs=2, verbose=0)
    sim.take()
    assert isinstance(sim.plan["table/embeddings"].decision, Float)
    assert quality(sim) > 30
