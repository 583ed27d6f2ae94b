"""`aimet_onnx`: what takes a `ModelProto` changes it in place where AIMET does."""
