# ruff: noqa: E402 -- torchvision has to be made loadable before what imports it
"""MCT (Sony): post-training quantization at its defaults in PyTorch; W4A8 with its gradient-based `gptq`, as
by default and without the weights of layers, most of its time."""

from __future__ import annotations

import contextlib
import functools
import unittest.mock

from common import BATCH, bench, evaluate, let_torchvision_load, network

let_torchvision_load()
import model_compression_toolkit
import torch
from model_compression_toolkit.constants import HESSIAN_NUM_ITERATIONS
from model_compression_toolkit.core.common.network_editors import NodeTypeFilter
from model_compression_toolkit.core.pytorch.hessian import activation_hessian_scores_calculator_pytorch as hessian

run = bench("model-compression-toolkit", "torch")
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


run.export(exported)


def few():
    for batch in run.batches(run.few):
        yield [torch.from_numpy(batch)]


EPOCHS = 50
"""How often its `gptq` sees the photos; it has no default, its tutorial takes 50."""


def rounded(**settings):
    core = model_compression_toolkit.core
    bits = core.BitWidthConfig()
    for kind in (torch.nn.Conv2d, torch.nn.Linear):
        bits.set_manual_weights_bit_width(NodeTypeFilter(kind), 4, "weight")
    model, _ = model_compression_toolkit.gptq.pytorch_gradient_post_training_quantization(
        network(), data, core_config=core.CoreConfig(bit_width_config=bits), gptq_representative_data_gen=few,
        gptq_config=model_compression_toolkit.gptq.get_pytorch_gptq_config(EPOCHS, **settings),
    )  # fmt: skip
    return model.eval()


class Rehearsed(Exception):
    """Enough was timed."""


def rehearsal(mark):
    """Two of the random vectors by which it weighs layers before it trains; each is led back to every layer."""

    def first(vectors, told):
        for done, vector in enumerate(vectors):
            mark()
            if done:
                raise Rehearsed
            yield vector

    with contextlib.suppress(Rehearsed), unittest.mock.patch.object(hessian, "tqdm", first):
        rounded()


def unweighed():
    """All layers count the same; that there be weights is an option of its `gptq`, on by default."""
    return rounded(use_hessian_based_weights=False, use_hessian_sample_attention=False)


run.rounded(f"unweighed gptq of {EPOCHS} epochs", unweighed, evaluate)
if run.iterations:
    run.rehearsed("gptq before it trains", HESSIAN_NUM_ITERATIONS, 2, rehearsal)
else:
    run.rounded(f"gptq of {EPOCHS} epochs", rounded, evaluate)
run.end()
