"""Canonical graphs as ONNX models."""
