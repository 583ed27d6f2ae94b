"""AIMET-onnx: its per-channel configuration, `tf_enhanced`; W4A8 with SeqMSE and AdaRound at its defaults."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
from aimet_onnx import QuantizationSimModel, apply_adaround, apply_seq_mse
from aimet_onnx.common.defs import QuantScheme
from aimet_onnx.common.quantsim_config.utils import get_path_for_per_channel_config
from common import BATCH, bench, log

run = bench()
model = onnx.load(run.onnx)
plain = onnxruntime.InferenceSession(run.onnx, providers=["CPUExecutionProvider"])
feeds = [{"image": batch} for batch in run.batches(run.calibration)]
few = [{"image": batch} for batch in run.batches(run.calibration[: run.rounding])]


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
try:
    run.seconds("export", lambda: sim.export(str(run.work), "aimet_onnx"))
except Exception as e:  # what a peer can't do is a row of the table, not the end of the run
    log(f"export: {type(e).__name__}: {e}")
first = run.calibration[:BATCH]
run.turns({"float pass": lambda: through(plain)(first), "simulated pass": lambda: through(sim.session)(first)})
for name, technique in (("seq_mse", apply_seq_mse), ("adaround", apply_adaround)) if run.rounding else ():
    low = simulation("int4")
    try:
        run.seconds(name, lambda low=low, technique=technique: technique(low, few))
        low.compute_encodings(feeds)
        run.accuracy(f"W4A8 {name}", through(low.session))
    except Exception as e:
        log(f"{name}: {type(e).__name__}: {e}")
run.end("aimet-onnx", "onnxruntime")
