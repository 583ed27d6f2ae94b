"""LiteRT's quantizer (once ai-edge-quantizer): its recipe `static_wi8_ai8`, min-max; its file runs in LiteRT."""

from __future__ import annotations

from common import bench, channels_last, litert
from litert_quantizer import quantizer, recipe

run = bench("litert-quantizer", "ai-edge-litert")
run.accuracy("float", litert(run.tflite))


def calibrated():
    made = quantizer.Quantizer(str(run.tflite), recipe.static_wi8_ai8())
    feeds = [{"image": channels_last(batch)} for batch in run.batches(run.calibration)]
    return made.quantize(made.calibrate({"serving_default": feeds}, num_threads=1))


quantized = run.seconds("calibrate", calibrated)


def written():
    path = run.work / "litert_quantizer.tflite"
    quantized.export_model(str(path), overwrite=True)
    return path


run.export(written, litert)
run.end()
