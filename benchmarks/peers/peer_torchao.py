"""torchao's PT2E: `X86InductorQuantizer` at its default static configuration, eager; its QAT's fake quantization."""

from __future__ import annotations

import torch
import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
from common import BATCH, bench, evaluate, network, training_step
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

run = bench("torchao", "torch")
module = network()
sample = (torch.from_numpy(run.calibration[:BATCH]),)
batch = {0: torch.export.Dim("N")}
run.accuracy("float", evaluate(module))


def exported():
    return torch.export.export(network(), sample, dynamic_shapes=(batch,)).module()


def calibrated():
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported(), quantizer)
    with torch.inference_mode():
        for images in run.batches(run.calibration):
            prepared(torch.from_numpy(images))
    return convert_pt2e(prepared)


quantized = run.seconds("calibrate", calibrated)
run.accuracy("W8A8", evaluate(quantized))
run.turns(
    {
        "float pass": lambda: evaluate(module)(run.calibration[:BATCH]),
        "simulated pass": lambda: evaluate(quantized)(run.calibration[:BATCH]),
    }
)


def written():
    path = run.work / "torchao.onnx"
    torch.onnx.export(
        quantized, sample, path, input_names=["image"], output_names=["logits"], dynamo=True, dynamic_shapes=(batch,)
    )
    return path


run.export(written)
learner = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
training = prepare_qat_pt2e(exported(), learner)
run.turns({"float step": training_step(network(), run), "training step": training_step(training, run)})
run.end()
