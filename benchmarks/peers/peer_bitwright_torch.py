"""bitwright in PyTorch: target `onnxruntime-cpu` (int8 per channel, uint8 activations); W4A8 by two techniques."""

from __future__ import annotations

import torch
from common import BATCH, bench, evaluate, network, training_step

from bitwright.simulation import QuantSim

run = bench()
module = network()
sample = torch.from_numpy(run.calibration[:BATCH])
run.accuracy("float", evaluate(module))
few = run.calibration[: run.rounding]


def calibrated() -> QuantSim:
    return QuantSim(module, sample, target="onnxruntime-cpu").apply("fold_batch_norm").calibrate(run.calibration)


sim = run.seconds("calibrate", calibrated)
run.accuracy("W8A8", evaluate(sim.model))
run.seconds("export", lambda: sim.export(run.work / "bitwright_torch"))
run.artefact(next((run.work / "bitwright_torch").glob("*.qdq.onnx")))
run.turns(
    {
        "float pass": lambda: evaluate(module)(run.calibration[:BATCH]),
        "simulated pass": lambda: evaluate(sim.model)(run.calibration[:BATCH]),
    }
)
run.turns(
    {
        "float step": training_step(network(), run),
        "training step": training_step(sim.trainable(), run),
    }
)
for technique in ("adaround", "gptq") if run.rounding else ():
    low = QuantSim(module, sample, weights="int4").apply("fold_batch_norm")
    run.seconds(technique, lambda low=low, technique=technique: low.apply(technique, few))
    run.accuracy(f"W4A8 {technique}", evaluate(low.calibrate(run.calibration).model))
run.end("bitwright", "torch")
