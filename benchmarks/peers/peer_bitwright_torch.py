"""bitwright in PyTorch: target `onnxruntime-cpu` (int8 per channel, uint8 activations); W4A8 by two techniques."""

from __future__ import annotations

import torch
from common import BATCH, bench, evaluate, network, training_step

from bitwright.simulation import QuantSim

run = bench("bitwright", "torch")
module = network()
sample = torch.from_numpy(run.calibration[:BATCH])
run.accuracy("float", evaluate(module))


def calibrated() -> QuantSim:
    return QuantSim(module, sample, target="onnxruntime-cpu").apply("fold_batch_norm").calibrate(run.calibration)


sim = run.seconds("calibrate", calibrated)
run.accuracy("W8A8", evaluate(sim.model))
run.export(lambda: sim.export(run.work / "bitwright_torch").files["qdq"])
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
for technique in ("adaround", "gptq"):
    run.rounded(
        technique,
        lambda technique=technique: (
            QuantSim(module, sample, weights="int4").apply("fold_batch_norm").apply(technique, run.few)
        ),
        lambda low: evaluate(low.calibrate(run.calibration).model),
    )
run.end()
