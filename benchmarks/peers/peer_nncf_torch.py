"""NNCF in PyTorch: `nncf.quantize` at its defaults (int8, bias correction at the end)."""

from __future__ import annotations

import os

os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # it compiles its kernels first, which takes a while

import nncf
import torch
from common import BATCH, bench, evaluate, log, network, training_step


class Whole(torch.nn.Module):
    """NNCF keeps a module of its own among the children, which `Sequential` would call."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image)


run = bench()
module = network()
run.accuracy("float", evaluate(module))
dataset = nncf.Dataset([torch.from_numpy(batch) for batch in run.batches(run.calibration)])


def calibrated():
    return nncf.quantize(Whole().eval(), dataset, subset_size=len(run.calibration) // BATCH + 1)


quantized = run.seconds("calibrate", calibrated)
run.accuracy("W8A8", evaluate(quantized))


def exported():
    path = run.work / "nncf_torch.onnx"
    torch.onnx.export(nncf.strip(quantized), (torch.from_numpy(run.calibration[:1]),), path, dynamo=False)
    return path


try:
    run.artefact(run.seconds("export", exported))
except Exception as e:  # what a peer can't do is a row of the table, not the end of the run
    log(f"export: {type(e).__name__}: {e}")
run.turns(
    {
        "float pass": lambda: evaluate(module)(run.calibration[:BATCH]),
        "simulated pass": lambda: evaluate(quantized)(run.calibration[:BATCH]),
    }
)
run.turns({"float step": training_step(network(), run), "training step": training_step(quantized, run)})
run.end("nncf", "torch")
