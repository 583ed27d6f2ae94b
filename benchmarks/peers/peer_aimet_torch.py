"""AIMET-torch: its per-channel configuration, `post_training_tf_enhanced`; W4A8 with AdaRound at its defaults."""

from __future__ import annotations

import copy

import aimet_torch.onnx
import torch
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.batch_norm_fold import fold_all_batch_norms
from aimet_torch.common.defs import QuantScheme
from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
from aimet_torch.quantsim import QuantizationSimModel
from common import BATCH, bench, evaluate, network, training_step

run = bench()
module = network()
sample = torch.from_numpy(run.calibration[:BATCH])
run.accuracy("float", evaluate(module))


def calibrate(model, images=run.calibration):
    with torch.inference_mode():
        for batch in run.batches(images):
            model(torch.from_numpy(batch))


def simulation(model, bits, encodings=None):
    sim = QuantizationSimModel(
        model, sample, quant_scheme=QuantScheme.post_training_tf_enhanced, default_param_bw=bits, default_output_bw=8,
        config_file=get_path_for_per_channel_config(),
    )  # fmt: skip
    if encodings:
        sim.set_and_freeze_param_encodings(encodings)
    sim.compute_encodings(calibrate)
    return sim


def calibrated():
    folded = copy.deepcopy(module)
    fold_all_batch_norms(folded, tuple(sample.shape), dummy_input=sample)
    return simulation(folded, 8)


sim = run.seconds("calibrate", calibrated)
run.accuracy("W8A8", evaluate(sim.model))


def exported():
    path = run.work / "aimet_torch.onnx"
    aimet_torch.onnx.export(
        sim, (sample,), str(path), input_names=["image"], output_names=["logits"], dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("N")},),
    )  # fmt: skip
    return path


run.export(exported)
run.turns(
    {
        "float pass": lambda: evaluate(module)(run.calibration[:BATCH]),
        "simulated pass": lambda: evaluate(sim.model)(run.calibration[:BATCH]),
    }
)
run.turns({"float step": training_step(network(), run), "training step": training_step(sim.model, run)})


steps = run.iterations or 15_000  # what it takes below 8 bits


def rounded():
    folded = copy.deepcopy(module)
    fold_all_batch_norms(folded, tuple(sample.shape), dummy_input=sample)
    few = [torch.from_numpy(batch) for batch in run.batches(run.few)]
    parameters = AdaroundParameters(
        data_loader=few, num_batches=len(few), default_num_iterations=steps, forward_fn=lambda model, x: model(x)
    )
    return Adaround.apply_adaround(
        folded, sample, parameters, path=str(run.work), filename_prefix="aimet_adaround", default_param_bw=4,
        default_quant_scheme=QuantScheme.post_training_tf_enhanced,
        default_config_file=get_path_for_per_channel_config(),
    )  # fmt: skip


def opened(better):
    return evaluate(simulation(better, 4, str(run.work / "aimet_adaround.encodings")).model)


run.rounded(f"adaround {steps}", rounded, opened)
run.end("aimet-torch", "torch")
