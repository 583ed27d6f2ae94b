"""The second integer runtime of `verify`: LiteRT's (TensorFlow Lite's) interpreter on an exported .tflite file.

Plain built-in kernels are used, not the XNNPACK delegate: it fuses further, and keeps no tensors to look at.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.backend import Batch, Bundle, Tap
from bitwright.errors import InputError, MissingExtraError, ModelError, first_line
from bitwright.files import Array
from bitwright.graph import TensorId

TFLITE = "tflite"
"""Purpose of the file in a bundle."""


class LiteRtSession:
    """A .tflite file, ready to run (`bitwright.backend.Session`).

    Args:
        path: the file, as `write_tflite` makes it.
        taps: tensors (sites) wanted beside the outputs, dequantized; those that the file doesn't have, because they
            were fused into a kernel, are left out.
        threads: of the interpreter.

    Raises:
        InputError: there is no such file, or it is not a TFLite model.
        MissingExtraError: there is no interpreter.
    """

    def __init__(self, path: str | Path, taps: Sequence[TensorId] = (), *, threads: int = 1) -> None:
        path = Path(path)
        if not path.is_file():
            raise InputError(f"there is no file {str(path)!r}")
        interpreter, resolver = _interpreter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._interpreter = interpreter(
                    model_content=path.read_bytes(),
                    experimental_op_resolver_type=resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
                    experimental_preserve_all_tensors=bool(taps),
                    num_threads=threads,
                )
            self._interpreter.allocate_tensors()
        except Exception as error:
            raise InputError(f"{str(path)!r} can't be run: {first_line(error)}") from error
        self._inputs = {d["name"]: d for d in self._interpreter.get_input_details()}
        outputs = [d["name"] for d in self._interpreter.get_output_details()]
        details = {d["name"]: d for d in self._interpreter.get_tensor_details() if d["name"]}
        # A quantized input's integers have a name of their own: the input's goes to the float tensor.
        found = {t: f"{t}_int8" if t in self._inputs and f"{t}_int8" in details else t for t in taps}
        self._fetch = {Tap(n): details[n] for n in outputs}
        self._fetch |= {Tap(t): details[n] for t, n in found.items() if n in details}
        sizes = {int(d["shape"][0]) for d in self._inputs.values() if len(d["shape"])}
        if len(sizes) > 1:
            raise ModelError(f"the inputs of {str(path)!r} have different batch sizes: {sorted(sizes)}")
        self.batch_size = sizes.pop() if sizes else 1

    def run(self, batch: Batch) -> dict[Tap, Array]:
        """The outputs, then the taps; the batch is run in pieces of the file's own batch size.

        Raises:
            InputError: an input is missing or doesn't fit.
        """
        if missing := [n for n in self._inputs if n not in batch]:
            raise InputError(f"the batch has no array for input {missing[0]!r}; it holds {list(batch)}")
        samples = len(next(iter(batch.values()))) if self._inputs else 0
        if samples % self.batch_size:
            raise InputError(f"{samples} samples don't fill batches of {self.batch_size}, which the file was made for")
        parts: dict[Tap, list[Array]] = {tap: [] for tap in self._fetch}
        for start in range(0, samples, self.batch_size):
            for name, detail in self._inputs.items():
                given = np.asarray(batch[name][start : start + self.batch_size])
                if given.shape != tuple(detail["shape"]):
                    wanted = list(map(int, detail["shape"][1:]))
                    raise InputError(f"input {name!r} has samples of shape {list(given.shape[1:])}, not {wanted}")
                self._interpreter.set_tensor(detail["index"], _coded(given, detail))
            self._interpreter.invoke()
            for tap, detail in self._fetch.items():
                parts[tap].append(_real(self._interpreter.get_tensor(detail["index"]), detail))
        return {tap: np.concatenate(p) if p else np.zeros((0,), np.float32) for tap, p in parts.items()}


class LiteRt:
    """LiteRT as an integer runtime of `verify` (`bitwright.backend.IntegerRuntime`)."""

    def compile(self, bundle: Bundle, taps: Sequence[TensorId] = ()) -> LiteRtSession:
        """See `compile_bundle`."""
        return compile_bundle(bundle, taps)


def compile_bundle(bundle: Bundle, taps: Sequence[TensorId] = ()) -> LiteRtSession:
    """Load an exported bundle's .tflite file (`bitwright.backend.IntegerRuntime`).

    Raises:
        InputError: the bundle holds none.
    """
    path = bundle.files.get(TFLITE)
    if path is None:
        raise InputError(f"the bundle holds no .tflite file, only {', '.join(bundle.files) or 'nothing'}")
    return LiteRtSession(path, taps)


def _coded(values: Array, detail: Any) -> Array:
    """A float input as the file takes it."""
    dtype, (scale, zero) = np.dtype(detail["dtype"]), detail["quantization"]
    if dtype.kind == "f" or not scale or values.dtype == dtype:
        return np.asarray(values, dtype)
    limits = np.iinfo(dtype)
    return np.asarray(np.clip(np.rint(values / np.float32(scale)) + zero, limits.min, limits.max), dtype)


def _real(values: Array, detail: Any) -> Array:
    """(q − zero point) · scale in float32; per channel along its axis."""
    numbers = detail["quantization_parameters"]
    scales, zeros = numbers["scales"], numbers["zero_points"]
    if not len(scales) or values.dtype.kind == "f":
        return np.array(values)
    shape = [1] * values.ndim
    if len(scales) > 1:
        shape[numbers["quantized_dimension"]] = len(scales)
    zero, scale = (np.asarray(v).reshape(shape) for v in (zeros, scales))
    return np.asarray((values.astype(np.int64) - zero).astype(np.float32) * scale.astype(np.float32))


def _interpreter() -> tuple[Any, Any]:
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ModuleNotFoundError:
        try:
            import tensorflow as tf

            return tf.lite.Interpreter, tf.lite.experimental.OpResolverType
        except (ModuleNotFoundError, AttributeError) as error:
            raise MissingExtraError(
                'running .tflite files needs an interpreter: pip install "bitwright[tensorflow]" (or ai-edge-litert)'
            ) from error
    return Interpreter, OpResolverType
