"""Which integer runtime runs an exported bundle: LiteRT its .tflite file, ONNX Runtime its QDQ model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bitwright.backend import Array, Bundle, Session
from bitwright.errors import InputError, MissingExtraError
from bitwright.graph import TensorId
from bitwright_keras import litert
from bitwright_keras.tflite_file import TfliteFile

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
    try:
        from bitwright_onnx.runtime import IntegerSession
        from bitwright_onnx.runtime import compile_bundle as compile_qdq
    except ModuleNotFoundError as error:
        raise MissingExtraError(f'QDQ models need {error.name}: pip install "bitwright[onnx]"') from error
    known = IntegerSession.tensors(bundle.files[QDQ])
    return compile_qdq(bundle, [t for t in taps if t in known])


def pairs_of(bundle: Bundle) -> Mapping[TensorId, Sequence[Array]]:
    """Tensor → the scales that it passes through, of the QDQ model, or else of the .tflite file.

    Raises:
        InputError: the bundle has neither.
    """
    if QDQ in bundle.files:
        from bitwright_onnx.qdq_pairs import pairs_of as of_qdq

        return of_qdq(bundle.files[QDQ])
    if litert.TFLITE not in bundle.files:
        raise InputError("the bundle holds no quantized model (.tflite or .qdq.onnx)")
    grids = TfliteFile.read(bundle.files[litert.TFLITE]).grids()
    return {name: [np.asarray(grid.scale)] for name, grid in grids.items()}
