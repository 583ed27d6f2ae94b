"""ONNX Runtime's static quantizer: QDQ, per channel, min-max, after its own preprocessing."""

from __future__ import annotations

from common import bench
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

run = bench("onnxruntime", "onnx")
run.accuracy("float", run.session(run.onnx))


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self.feeds = iter([{"image": batch} for batch in run.batches(run.calibration)])

    def get_next(self):
        return next(self.feeds, None)


prepared, path = run.work / "ort_prepared.onnx", run.work / "ort_quantized.onnx"


def quantized() -> None:
    quant_pre_process(run.onnx, prepared)
    quantize_static(prepared, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)


run.seconds("calibrate", quantized)
run.artefact(path)
run.end()
