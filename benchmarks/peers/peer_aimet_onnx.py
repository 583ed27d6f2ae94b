"""AIMET-onnx: its per-channel configuration, `tf_enhanced`; W4A8 with SeqMSE, and AdaRound with the
steps that its documentation recommends."""

from __future__ import annotations

import copy
import unittest.mock
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from aimet_onnx import QuantizationSimModel, apply_adaround, apply_seq_mse
from aimet_onnx.adaround.adaround_loss import AdaroundLoss
from aimet_onnx.common.defs import QuantScheme
from aimet_onnx.common.quantsim_config.utils import get_path_for_per_channel_config
from common import BATCH, bench

run = bench("aimet-onnx", "onnxruntime")
model = onnx.load(run.onnx)
plain = onnxruntime.InferenceSession(run.onnx, providers=["CPUExecutionProvider"])
feeds = [{"image": batch} for batch in run.batches(run.calibration)]
few = [{"image": batch} for batch in run.batches(run.few)]


def simulation(bits: str, scheme: QuantScheme = QuantScheme.post_training_tf_enhanced) -> QuantizationSimModel:
    return QuantizationSimModel(
        copy.deepcopy(model), quant_scheme=scheme, param_type=bits,
        activation_type="int8", config_file=get_path_for_per_channel_config(),
    )  # fmt: skip


def calibrated() -> QuantizationSimModel:
    sim = simulation("int8")
    sim.compute_encodings(feeds)
    return sim


def through(session):
    def outputs(images: np.ndarray) -> np.ndarray:
        return session.run(None, {"image": images})[0]

    return outputs


run.accuracy("float", through(plain))
sim = run.seconds("calibrate", calibrated)
run.accuracy("W8A8", through(sim.session))


def exported() -> Path:
    path = run.work / "aimet_onnx.onnx"
    onnx.save(sim.to_onnx_qdq(), path)
    return path


run.export(exported)
first = run.calibration[:BATCH]
run.turns({"float pass": lambda: through(plain)(first), "simulated pass": lambda: through(sim.session)(first)})


def searched() -> QuantizationSimModel:
    """Scales by the error of each layer's output; roundings are to nearest. It takes min-max only."""
    low = simulation("int4", QuantScheme.min_max)
    apply_seq_mse(low, few)
    return low


STEPS = 15_000
"""What its documentation recommends below 8 bits."""


def rounded(steps: int = STEPS) -> QuantizationSimModel:
    low = simulation("int4")
    apply_adaround(low, few, steps)
    return low


kept: list[QuantizationSimModel] = []


def opened(low: QuantizationSimModel):
    low.compute_encodings(feeds)
    kept.append(low)  # its sessions read what the simulation owns, and crash once that is gone
    return through(low.session)


def rehearsal(mark) -> None:
    loss = AdaroundLoss.compute_round_loss

    def marked(*arguments):
        mark()
        return loss(*arguments)

    with unittest.mock.patch.object(AdaroundLoss, "compute_round_loss", marked):
        rounded(run.iterations)


run.rounded("seq_mse", searched, opened)
if run.iterations:
    run.rehearsed("adaround", STEPS, run.iterations, rehearsal)
else:
    run.rounded(f"adaround {STEPS}", rounded, opened)
run.end()
