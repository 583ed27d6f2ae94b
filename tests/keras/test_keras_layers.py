"""Each layer class of `keras.layers` once: the float model computes what Keras does; what is refused is listed.

Run as a program, with names of layers or without, all steps are taken: calibrate at W16A16, export, compare the QDQ
model with the simulation, verify.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")

import keras_layers as table  # noqa: E402
from shares import WHOLE, one_of_each_rank  # noqa: E402

from bitwright import QuantSim  # noqa: E402
from bitwright.backend import Tap  # noqa: E402
from bitwright.errors import BitwrightError  # noqa: E402
from bitwright.testing.contract_base import run  # noqa: E402
from bitwright.verify import sqnr, verify  # noqa: E402
from bitwright_keras.backend import KerasBackend  # noqa: E402

TENSORFLOW = keras.backend.backend() == "tensorflow"
SHOWN = ("GRUCell", "ConvLSTM1D", "Masking", "MixUp", "CategoryEncoding", "Discretization", "GroupNormalization",
         *(("PReLU", "BatchNormalization", "LSTM") if WHOLE else ()))  # fmt: skip
"""Those that take all steps in each run of the tests; each of them had no QDQ file at some time. Three more are looked
at in test_keras_emitted.py, and here if the whole was asked for."""


def test_every_class_has_an_entry() -> None:
    assert set(table.classes()) == set(table.CASES) | set(table.NO_MODEL)
    assert not set(table.CASES) & set(table.NO_MODEL)
    for refusals in (table.NOT_OPENED, table.NOT_EXPORTED, table.NOT_VERIFIED):
        assert set(refusals) <= set(table.CASES)


def test_the_lists_of_refusals_only_shrink() -> None:
    assert (len(table.NOT_OPENED), len(table.NOT_EXPORTED), len(table.NOT_VERIFIED)) <= (1, 6, 2)


@pytest.mark.skipif(not TENSORFLOW, reason="the table is for Keras on TensorFlow")
@pytest.mark.parametrize("name", one_of_each_rank(table.CASES))
def test_float_models_compute_what_keras_does(name: str) -> None:
    model, data = table.model_of(name)
    backend = KerasBackend()
    if name in table.NOT_OPENED:
        with pytest.raises(BitwrightError):
            backend.adopt(model)
        return
    given = list(data.values())
    expected = keras.tree.flatten(model(given, training=False))
    found = backend.adopt(model)
    values = run(backend.session(found, [Tap(t) for t in found.output_ids]), data)
    for a, b in zip(expected, values.values(), strict=True):
        a = keras.ops.convert_to_numpy(a)
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max())


@pytest.mark.skipif(not TENSORFLOW, reason="the table is for Keras on TensorFlow")
@pytest.mark.parametrize("name", SHOWN)
def test_exports_are_the_simulation(name: str, tmp_path: Path) -> None:
    assert proved(name, tmp_path) == ""


def proved(name: str, folder: Path) -> str:
    """Takes all steps; what stands against it in words, or empty."""
    import onnxruntime as ort

    model, data = table.model_of(name)
    sim = QuantSim(model, weights="int16", activations="uint16").calibrate(data)
    real, simulated = (sim.predict(data, simulated=v) for v in (False, True))
    if (least := min(sqnr(a, b) for a, b in zip(real, simulated, strict=True))) < 60:
        return f"simulation {least:.1f} dB"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bundle = sim.export(folder, name="net")
    if "qdq" not in bundle.files:
        return "no QDQ file"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(bundle.files["qdq"]), options, providers=["CPUExecutionProvider"])
    exported = session.run(None, data)
    if (least := min(sqnr(a, b) for a, b in zip(simulated, exported, strict=True))) < 70:
        return f"QDQ {least:.1f} dB"
    return "; ".join(verify(folder, data, name="net").problems)


def main(names: list[str]) -> int:
    """Every layer named, or all, one line each; 1 if one ends otherwise than the lists say."""
    listed = table.NOT_OPENED | table.NOT_EXPORTED | table.NOT_VERIFIED
    wrong = 0
    for name in names or sorted(table.CASES):
        with tempfile.TemporaryDirectory() as folder:
            try:
                told = proved(name, Path(folder))
            except BitwrightError as error:
                told = f"{type(error).__name__}: {str(error)[:160]}"
            except Exception as error:
                told, wrong = f"untyped {type(error).__name__}: {str(error)[:160]}", wrong + 1
        as_listed = bool(told) == (name in listed)
        wrong += not as_listed
        print(f"{'  ' if as_listed else '! '}{name:46} {told or 'ok'}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
