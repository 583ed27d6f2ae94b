"""ONNX Runtime as an integer runtime of `verify`, for the exports of every backend."""

from __future__ import annotations

from collections.abc import Sequence

from bitwright.backend import Bundle, Session
from bitwright.bundle import PlainRisks
from bitwright.graph import TensorId
from bitwright_onnx.backend import OnnxBackend
from bitwright_onnx.export.runtime import IntegerSession, compile_bundle


class OnnxRuntime:
    """`bitwright.backend.IntegerRuntime`, and `bitwright.bundle.PlainRuntime` for sessions with default options."""

    def compile(self, bundle: Bundle, taps: Sequence[TensorId] = ()) -> Session:
        """Load the quantized model; taps that it has no tensor for are left out.

        Raises:
            InputError: the bundle holds no quantized model, or it is damaged.
            ModelError: ONNX Runtime refuses it.
        """
        known = IntegerSession.tensors(bundle.files["qdq"]) if "qdq" in bundle.files else frozenset(taps)
        return compile_bundle(bundle, [t for t in taps if t in known])

    def plain_session(self, bundle: Bundle) -> Session:
        """See `PlainRuntime`."""
        return OnnxBackend().plain_session(bundle)

    def plain_risks(self, bundle: Bundle) -> PlainRisks:
        """See `PlainRuntime`."""
        return OnnxBackend().plain_risks(bundle)

    def keep_exact(self, bundle: Bundle) -> tuple[str, ...]:
        """See `PlainRuntime`."""
        return OnnxBackend().keep_exact(bundle)
