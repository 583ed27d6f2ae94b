"""NNCF in ONNX: `nncf.quantize` at its defaults."""

from __future__ import annotations

import nncf
import onnx
from common import bench

run = bench("nncf", "onnxruntime")
float_model = onnx.load(run.onnx)
for entry in (*float_model.graph.input, *float_model.graph.output):  # bias correction takes a static batch only
    entry.type.tensor_type.shape.dim[0].dim_value = 1
dataset = nncf.Dataset(list(range(len(run.calibration))), lambda i: {"image": run.calibration[i : i + 1]})
run.accuracy("float", run.session(run.onnx))
quantized = run.seconds("calibrate", lambda: nncf.quantize(float_model, dataset, subset_size=len(run.calibration)))


def exported():
    path = run.work / "nncf_onnx.onnx"
    onnx.save(quantized, path)
    return path


run.export(exported)
run.end()
