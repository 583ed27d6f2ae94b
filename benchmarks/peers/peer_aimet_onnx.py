"""AIMET-onnx: its per-channel configuration, `tf_enhanced`; W4A8 with SeqMSE and AdaRound at its defaults."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from aimet_onnx import QuantizationSimModel, apply_adaround, apply_seq_mse
from aimet_onnx.common.defs import QuantScheme
from aimet_onnx.common.quantsim_config.utils import get_path_for_per_channel_config
from common import BATCH, bench

run = bench()
model = onnx.load(run.onnx)
plain = onnxruntime.InferenceSession(run.onnx, providers=["CPUExecutionProvider"])
feeds = [{"image": batch} for batch in run.batches(run.calibration)]
few = [{"image": batch} for batch in run.batches(run.few)]


def simulation(bits: str) -> QuantizationSimModel:
    return QuantizationSimModel(
        copy.deepcopy(model), quant_scheme=QuantScheme.post_training_tf_enhanced, param_type=bits,
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


def rounded(technique):
    low = simulation("int4")
    technique(low)
    return low


def calibrated_low(low):
    low.compute_encodings(feeds)
    return through(low.session)


steps = run.iterations or 10_000
run.rounded("seq_mse", lambda: rounded(lambda low: apply_seq_mse(low, few)), calibrated_low)
run.rounded(f"adaround {steps}", lambda: rounded(lambda low: apply_adaround(low, few, steps)), calibrated_low)
run.end("aimet-onnx", "onnxruntime")
