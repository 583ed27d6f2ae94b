"""Which integer runtime runs an exported bundle: LiteRT its .tflite file, ONNX Runtime its QDQ model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bitwright.backend import Bundle, Pair, QuantizedArtefact, Session
from bitwright.errors import InputError, needs_extra
from bitwright.files import Array
from bitwright.graph import ParamId, TensorId
from bitwright_keras.export import litert

QDQ = "qdq"


def compile_bundle(bundle: Bundle, taps: Sequence[TensorId] = ()) -> Session:
    """Load the .tflite file if the bundle has one, otherwise the QDQ model.

    Raises:
        InputError: it has neither.
        MissingExtraError: the runtime isn't installed.
    """
    if litert.TFLITE in bundle.files:
        return litert.compile_bundle(bundle, taps)
    if QDQ not in bundle.files:
        raise InputError(f"the bundle holds no quantized model (.tflite or .qdq.onnx), only {', '.join(bundle.files)}")
    with needs_extra("QDQ models need", "onnx"):
        from bitwright_onnx.export.runtime import compile_known
    return compile_known(bundle, taps)


def pairs_of(bundle: Bundle) -> Mapping[TensorId, Sequence[Pair]]:
    """Tensor → the pairs that it passes through in the QDQ model.

    Raises:
        InputError: the bundle has none.
        MissingExtraError: the ONNX packages aren't installed.
    """
    return _onnx().pairs(bundle)


def floats_of(bundle: Bundle) -> Mapping[ParamId, Callable[[], Array]]:
    """Parameters that the QDQ model keeps in float.

    Raises:
        InputError, MissingExtraError: as `pairs_of`.
    """
    return _onnx().floats(bundle)


def _onnx() -> QuantizedArtefact:
    with needs_extra("QDQ models need", "onnx"):
        from bitwright_onnx.backend import OnnxBackend
    return OnnxBackend()
