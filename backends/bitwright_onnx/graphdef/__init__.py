"""Frozen TensorFlow graphs as ONNX models, under TensorFlow's own tensor names."""
