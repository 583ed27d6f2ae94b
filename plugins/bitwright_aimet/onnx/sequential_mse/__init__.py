"""`aimet_onnx.sequential_mse`."""

from __future__ import annotations

from bitwright_aimet.onnx.sequential_mse.seq_mse import apply_seq_mse

__all__ = ["apply_seq_mse"]
