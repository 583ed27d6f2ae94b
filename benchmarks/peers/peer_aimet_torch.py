# ruff: noqa: E402 -- torchvision has to be made loadable before what imports it
"""AIMET-torch: its per-channel configuration, `post_training_tf_enhanced`; W4A8 with SeqMSE and AdaRound at its
defaults."""

from __future__ import annotations

import copy
import unittest.mock

from common import BATCH, bench, evaluate, let_torchvision_load, network, training_step

let_torchvision_load()
import aimet_torch.onnx
import torch
from aimet_torch.adaround.adaround_loss import AdaroundLoss
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.batch_norm_fold import fold_all_batch_norms
from aimet_torch.common.defs import QuantScheme
from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
from aimet_torch.quantsim import QuantizationSimModel
from aimet_torch.seq_mse import apply_seq_mse

run = bench("aimet-torch", "torch")
module = network()
sample = torch.from_numpy(run.calibration[:BATCH])
run.accuracy("float", evaluate(module))


def calibrate(model, images=run.calibration):
    with torch.inference_mode():
        for batch in run.batches(images):
            model(torch.from_numpy(batch))


def simulated(model, bits):
    return QuantizationSimModel(
        model, sample, quant_scheme=QuantScheme.post_training_tf_enhanced, default_param_bw=bits, default_output_bw=8,
        config_file=get_path_for_per_channel_config(),
    )  # fmt: skip


def calibrated():
    sim = simulated(folded(), 8)
    sim.compute_encodings(calibrate)
    return sim


def folded():
    found = copy.deepcopy(module)
    fold_all_batch_norms(found, tuple(sample.shape), dummy_input=sample)
    return found


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


few = [torch.from_numpy(batch) for batch in run.batches(run.few)]


def searched():
    """Scales by the error of each layer's output; roundings are to nearest."""
    sim = simulated(folded(), 4)
    apply_seq_mse(sim, few)
    return sim


def calibrated_low(sim):
    sim.compute_encodings(calibrate)
    return evaluate(sim.model)


run.rounded("seq_mse", searched, calibrated_low)
STEPS = 15_000
"""Its default below 8 bits. Its optimizer moves a rounding by about 0.001 a step and isn't told to hurry: with far
fewer steps most roundings stay where they began."""


def rounded(steps=STEPS):
    parameters = AdaroundParameters(
        data_loader=few, num_batches=len(few), default_num_iterations=steps, forward_fn=lambda model, x: model(x)
    )
    return Adaround.apply_adaround(
        folded(), sample, parameters, path=str(run.work), filename_prefix="aimet_adaround", default_param_bw=4,
        default_quant_scheme=QuantScheme.post_training_tf_enhanced,
        default_config_file=get_path_for_per_channel_config(),
    )  # fmt: skip


def opened(better):
    sim = simulated(better, 4)
    sim.set_and_freeze_param_encodings(str(run.work / "aimet_adaround.encodings"))
    return calibrated_low(sim)


def rehearsal(mark):
    loss = AdaroundLoss.compute_round_loss

    def marked(*arguments):
        mark()
        return loss(*arguments)

    with unittest.mock.patch.object(AdaroundLoss, "compute_round_loss", marked):
        rounded(run.iterations)


if run.iterations:
    run.rehearsed("adaround", STEPS, run.iterations, rehearsal)
else:
    run.rounded(f"adaround {STEPS}", rounded, opened)
run.end()
