"""What any backend does with the QDQ file of a bundle. Nothing of ONNX is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from bitwright.backend import Bundle, Pair, Session
from bitwright.errors import needs_extra
from bitwright.files import Array
from bitwright.graph import ParamId, TensorId

if TYPE_CHECKING:
    from bitwright_onnx.backend import OnnxBackend


def onnx_backend(extra: str) -> OnnxBackend:
    """The backend that writes and runs QDQ files.

    Args:
        extra: of bitwright, that brings its packages.

    Raises:
        MissingExtraError: they aren't installed.
    """
    with needs_extra("QDQ files need", extra):
        from bitwright_onnx.backend import OnnxBackend
    return OnnxBackend()


class QdqBundles:
    """A base of backends whose bundles hold QDQ files: `IntegerRuntime` and `QuantizedArtefact`, in ONNX Runtime.

    Attributes:
        qdq_extra: of bitwright, that brings the packages.
    """

    qdq_extra: ClassVar[str] = "onnx"

    def compile(self, bundle: Bundle, taps: Sequence[TensorId] = ()) -> Session:
        """See `bitwright.backend.IntegerRuntime`; taps that the file doesn't have are left out.

        Raises:
            InputError: the bundle holds no quantized model.
            MissingExtraError: the packages aren't installed.
        """
        onnx_backend(self.qdq_extra)
        from bitwright_onnx.export.runtime import compile_known

        return compile_known(bundle, taps)

    def pairs(self, bundle: Bundle) -> Mapping[TensorId, Sequence[Pair]]:
        """See `bitwright.backend.QuantizedArtefact`.

        Raises:
            InputError, MissingExtraError: as `compile`.
        """
        return onnx_backend(self.qdq_extra).pairs(bundle)

    def floats(self, bundle: Bundle) -> Mapping[ParamId, Callable[[], Array]]:
        """See `bitwright.backend.QuantizedArtefact`.

        Raises:
            InputError, MissingExtraError: as `compile`.
        """
        return onnx_backend(self.qdq_extra).floats(bundle)
