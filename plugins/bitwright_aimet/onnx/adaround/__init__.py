"""`aimet_onnx.adaround`."""
