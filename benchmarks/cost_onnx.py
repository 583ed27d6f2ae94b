"""What quantization costs beside a float pass in ONNX Runtime: MobileNetV2, 224², batch 8, two threads, one run.

    pip install "bitwright[onnx,torch]" onnxscript
    python benchmarks/cost_onnx.py [--model NET.onnx] [--repeats 5] [--size 224] [--threads 2] [--clock wall]

Prints a line for each figure: seconds, and the ratio to the float pass of the same run, which is ONNX Runtime's own
session of the file. Without --model, MobileNetV2 of `cost_torch.py` is exported: weights are random, and time doesn't
depend on them. A network of one's own has one input of images. Calibration and the simulation are timed as in long
use, after the sessions have been made anew (`BLOCKED_AFTER` of the backend's sessions); `calibrate()` is timed whole.
Opening and exporting are given in float passes of 16 samples.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import cost
import numpy as np
import onnxruntime as ort

from bitwright.simulation import QuantSim
from bitwright_onnx.simulate.session import session_options

RUNS_BEFORE_TIMED = 8


def exported(path):
    """MobileNetV2 of `cost_torch.py` as an ONNX file."""
    import torch
    from cost_torch import mobilenet_v2

    torch.manual_seed(0)
    module, x = mobilenet_v2(), torch.randn(8, 3, 224, 224)
    module(x)  # batch norms that fit
    shapes = {"input": {0: torch.export.Dim("n")}}
    torch.onnx.export(module.eval(), (x,), path, dynamo=True, external_data=False, dynamic_shapes=shapes)


def main():
    parser = cost.parser(__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a network with one input of images; default: MobileNetV2")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    cost.steady_memory()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or Path(folder) / "mobilenet_v2.onnx"
        if options.model is None:
            exported(path)
        measure(path, Path(folder) / "bundle", options)


def measure(path, out, options):
    (name,) = QuantSim(path).graph.inputs
    generator = np.random.default_rng(0)
    two = [
        {name: generator.standard_normal((options.batch, 3, options.size, options.size), np.float32)} for _ in range(2)
    ]
    session = ort.InferenceSession(path, session_options(), providers=["CPUExecutionProvider"])
    tasks = {"float pass": lambda: session.run(None, two[0])}
    for scheme in ("minmax", "sqnr"):
        sim = QuantSim(path, scheme=scheme).calibrate(two)
        tasks[f"calibration, {scheme}, a batch"] = calibration = cost.calibration(sim, two[0])
        calibration()
        tasks[f"calibrate(), {scheme}, one batch"] = lambda sim=sim: sim.fork().calibrate(two[:1])
    simulated = sim.model
    for _ in range(RUNS_BEFORE_TIMED):
        simulated(two[0])
    tasks["simulated pass"] = lambda: simulated(two[0])
    found = cost.interleaved(tasks, options.repeats, options.clock)
    cost.show(found, lambda _: "float pass")

    sixteen = {name: np.concatenate([b[name] for b in two])[:16]}
    fixed = {
        "float pass, 16 samples": lambda: session.run(None, sixteen),
        "opening": lambda: QuantSim(path),
        "export()": lambda: sim.export(out),
    }
    found = cost.interleaved(fixed, options.repeats, options.clock)
    cost.show(found, lambda _: "float pass, 16 samples")


if __name__ == "__main__":
    main()
