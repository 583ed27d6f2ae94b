"""bitwright in ONNX: target `onnxruntime-cpu` (int8 per channel, uint8 activations); W4A8 by two techniques."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
from common import BATCH, bench

from bitwright.backend import Tap
from bitwright.simulation import QuantSim

run = bench("bitwright", "onnxruntime")
few = {"image": run.few}
data = {"image": run.calibration}
sim = run.seconds("calibrate", lambda: QuantSim(run.onnx, target="onnxruntime-cpu").calibrate(data))


def simulated(images: np.ndarray, sim: QuantSim = sim) -> np.ndarray:
    return sim.predict({"image": images})[0]


def in_float(images: np.ndarray) -> np.ndarray:
    return sim.predict({"image": images}, simulated=False)[0]


run.accuracy("float", in_float)
run.accuracy("W8A8", simulated)
run.export(lambda: sim.export(run.work / "bitwright_onnx").files["qdq"])
# As the peers': a plain session of the float file, and the simulation's own session, each opened once.
plain = onnxruntime.InferenceSession(run.onnx, providers=["CPUExecutionProvider"])
session = sim.simulation.session([Tap(t) for t in sim.graph.outputs])
first = {"image": run.calibration[:BATCH]}
run.turns({"float pass": lambda: plain.run(None, first), "simulated pass": lambda: session.run(first)})
for technique in ("adaround", "gptq"):
    run.rounded(
        technique,
        lambda technique=technique: QuantSim(run.onnx, weights="int4").apply(technique, few),
        lambda low: functools.partial(simulated, sim=low.calibrate(data)),
    )
run.end()
