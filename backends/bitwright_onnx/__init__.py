"""The ONNX backend: onnx-ir for rewriting, ONNX Runtime for execution."""
