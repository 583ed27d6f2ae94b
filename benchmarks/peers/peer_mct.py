"""MCT (Sony): post-training quantization at its defaults in PyTorch."""

from __future__ import annotations

import functools
import unittest.mock

import model_compression_toolkit
import torch
from common import BATCH, bench, evaluate, log, network

run = bench()
module = network()
run.accuracy("float", evaluate(module))


def data():
    for batch in run.batches(run.calibration):
        yield [torch.from_numpy(batch)]


def calibrated():
    model, _ = model_compression_toolkit.ptq.pytorch_post_training_quantization(network(), data)
    return model.eval()


quantized = run.seconds("calibrate", calibrated)
run.accuracy("W8A8", evaluate(quantized))
run.turns(
    {
        "float pass": lambda: evaluate(module)(run.calibration[:BATCH]),
        "simulated pass": lambda: evaluate(quantized)(run.calibration[:BATCH]),
    }
)


def exported():
    """In standard operators; MCT asks for torch's exporter in the words of the older one, which has to be chosen."""
    path = run.work / "mct.onnx"
    fake = model_compression_toolkit.exporter.QuantizationFormat.FAKELY_QUANT
    with unittest.mock.patch("torch.onnx.export", functools.partial(torch.onnx.export, dynamo=False)):
        model_compression_toolkit.exporter.pytorch_export_model(quantized, str(path), data, quantization_format=fake)
    return path


try:
    run.artefact(run.seconds("export", exported))
except Exception as e:  # what a peer can't do is a row of the table, not the end of the run
    log(f"export: {type(e).__name__}: {e}")
run.end("model-compression-toolkit", "torch")
