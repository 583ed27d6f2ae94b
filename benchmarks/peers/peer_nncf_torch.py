"""NNCF in PyTorch: `nncf.quantize` at its defaults (int8, bias correction at the end); W4A8 so, for its NPU."""

from __future__ import annotations

import os

os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # it compiles its kernels first, which takes a while

import nncf
import torch
from common import BATCH, bench, evaluate, network, training_step
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters


class Whole(torch.nn.Module):
    """NNCF keeps a module of its own among the children, which `Sequential` would call."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image)


run = bench("nncf", "torch")
module = network()
run.accuracy("float", evaluate(module))
dataset = nncf.Dataset([torch.from_numpy(batch) for batch in run.batches(run.calibration)])


def calibrated():
    return nncf.quantize(Whole().eval(), dataset, subset_size=len(run.calibration) // BATCH + 1)


quantized = run.seconds("calibrate", calibrated)
run.accuracy("W8A8", evaluate(quantized))


def exported():
    path, first = run.work / "nncf_torch.onnx", torch.from_numpy(run.calibration[:1])
    torch.onnx.export(nncf.strip(quantized, example_input=first), (first,), path, dynamo=False)
    return path


run.export(exported)
run.turns(
    {
        "float pass": lambda: evaluate(module)(run.calibration[:BATCH]),
        "simulated pass": lambda: evaluate(quantized)(run.calibration[:BATCH]),
    }
)
run.turns({"float step": training_step(network(), run), "training step": training_step(quantized, run)})


def four_bits():
    weights = QuantizationParameters(num_bits=4)
    return nncf.quantize(
        Whole().eval(), dataset, subset_size=len(run.calibration) // BATCH + 1,
        target_device=nncf.TargetDevice.NPU,  # the others don't have 4 bits
        advanced_parameters=AdvancedQuantizationParameters(weights_quantization_params=weights),
    )  # fmt: skip


run.rounded("nearest, bias correction", four_bits, evaluate)
run.end()
