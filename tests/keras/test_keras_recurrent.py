"""Recurrent layers in QDQ ONNX: one op in the runtime, equal to the simulation."""

# ruff: noqa: PLW0108

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
pytest.importorskip("onnxruntime")
if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another framework here", allow_module_level=True)

import onnx  # noqa: E402
import onnxruntime as ort  # noqa: E402
from keras import layers as L  # noqa: E402

from bitwright import QuantSim  # noqa: E402
from bitwright.verify import sqnr, verify  # noqa: E402


def states(kind: Any, **options: Any) -> Any:
    """An encoder whose states begin a decoder's."""

    def call(x: Any) -> Any:
        _, *state = kind(5, return_state=True, **options)(x)
        return L.Dense(3)(kind(5, return_sequences=True, **options)(x[:, ::-1], initial_state=state))

    return call


def every_state(x: Any) -> Any:
    return L.Bidirectional(L.LSTM(4, return_sequences=True, return_state=True))(x)


NETS: dict[str, tuple[str, Any]] = {
    "last": ("LSTM", lambda x: L.Dense(3)(L.LSTM(5)(x))),
    "sequence, no bias": ("LSTM", lambda x: L.Dense(3)(L.LSTM(5, return_sequences=True, use_bias=False)(x))),
    "backwards": ("LSTM", lambda x: L.Dense(3)(L.LSTM(5, return_sequences=True, go_backwards=True)(x))),
    "hard gates": ("LSTM", lambda x: L.LSTM(5, recurrent_activation="hard_sigmoid", activation="relu")(x)),
    "states": ("LSTM", states(L.LSTM)),
    "both": ("LSTM", lambda x: L.Dense(3)(L.Bidirectional(L.LSTM(5, return_sequences=True))(x))),
    "both, last": ("LSTM", lambda x: L.Dense(3)(L.Bidirectional(L.LSTM(5), merge_mode="sum")(x))),
    "both, every state": ("LSTM", every_state),
    "two in a row": ("LSTM", lambda x: L.LSTM(3)(L.Dropout(0.2)(L.LSTM(5, return_sequences=True, dropout=0.1)(x)))),
    "gru": ("GRU", lambda x: L.Dense(3)(L.GRU(5, return_sequences=True)(x))),
    "gru, reset before": ("GRU", lambda x: L.Dense(3)(L.GRU(5, reset_after=False)(x))),
    "gru, states": ("GRU", states(L.GRU)),
    "gru, both": ("GRU", lambda x: L.Dense(3)(L.Bidirectional(L.GRU(5, return_sequences=True), merge_mode="ave")(x))),
    "rnn": ("RNN", lambda x: L.Dense(3)(L.SimpleRNN(5, return_sequences=True)(x))),
    "rnn, both": ("RNN", lambda x: L.Dense(3)(L.Bidirectional(L.SimpleRNN(4, activation="relu"), merge_mode="mul")(x))),
}


def drawn(model: Any) -> Any:
    rng = np.random.default_rng(2)
    for v in model.variables:
        if str(v.dtype).startswith("float"):
            v.assign(rng.normal(size=tuple(v.shape)) * 0.4)
    return model


@pytest.mark.filterwarnings("ignore:.* no .h5 is written:UserWarning")
@pytest.mark.parametrize(
    ("name", "steps"), [*((name, 7) for name in NETS), ("states", None), ("both", None), ("gru, both", None)]
)
def test_layers_are_ops_of_the_runtime(name: str, steps: int | None, tmp_path: Path) -> None:
    kind, call = NETS[name]
    x = keras.Input((steps, 4), name="x")
    model = drawn(keras.Model(x, call(x)))
    data = {"x": np.random.default_rng(3).normal(size=(6, 7, 4)).astype(np.float32)}
    sim = QuantSim(model).calibrate(data)
    bundle = sim.export(tmp_path, name="net")
    ops = [n.op_type for n in onnx.load(bundle.files["qdq"]).graph.node]
    assert kind in ops
    assert not {"Loop", "Scan"} & set(ops)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(bundle.files["qdq"]), options, providers=["CPUExecutionProvider"])
    for mine, theirs in zip(sim.predict(data), session.run(None, data), strict=True):
        assert mine.shape == theirs.shape
        assert sqnr(mine, theirs) >= 60
    if steps is not None and name in ("states", "both, every state", "gru, both"):
        assert not verify(tmp_path, data, name="net").problems
