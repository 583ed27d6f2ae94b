"""Model files that are small and stand for something enormous: found before memory or time is spent on them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras

from bitwright.errors import InputError, ModelError
from bitwright_keras.capture.tracing import Recording, functional_of, recorded
from bitwright_keras.capture.trial_reading import weight_bytes
from bitwright_keras.graph.model import KerasModel

_BYTES, _TIMES = 2**24, 20
"""What a file holds may unpack to so many bytes, or to so many times its own."""
_CALLS, _TIMES_WRITTEN = 2_000, 100
"""So many calls may a model have with its nested models written out, or so many times those that it states."""
_COMPARED_BYTES, _TIMES_WEIGHTS = 2**27, 64
"""What a trial run of a file's model may compute, or so many times its weights."""
_LOADING = threading.Lock()


@contextmanager
def bounded_loading(path: Path) -> Iterator[None]:
    """While the block runs, Keras may open a file: it is looked at first, and layers get no more weights than it has.

    Raises:
        InputError: the file unpacks to far more than its own size, or its layers ask for far more weights than it
            holds.
    """
    size = path.stat().st_size
    held = _weights_of(path, size)
    most = _BYTES + 4 * held
    own, made = threading.get_ident(), 0
    add_weight = keras.layers.Layer.add_weight

    def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal made
        if threading.get_ident() == own:
            made += 4 * _product(kwargs.get("shape") or (args[0] if args else ()))
            if made > most:
                raise MemoryError("the layers' weights")
        return add_weight(layer, *args, **kwargs)

    with _LOADING:
        keras.layers.Layer.add_weight = counted
        try:
            yield
        except Exception as error:
            if made <= most:
                raise
            raise InputError(
                f"{path} can't be opened: its layers ask for {made / 2**20:,.0f} MiB of weights, and the file holds "
                f"{held / 2**20:,.1f}"
            ) from error
        finally:
            keras.layers.Layer.add_weight = add_weight


def _weights_of(path: Path, size: int) -> int:
    """Bytes of the weights in a file, by its own account; 0 where it isn't one.

    Raises:
        InputError: they, or the members of the archive, are far larger than the file; or it can't be read through.
    """
    most = max(_BYTES, _TIMES * size)
    held = weight_bytes(path, most)
    if held > most:
        raise InputError(
            f"{path} can't be opened: its {size / 2**20:,.1f} MiB unpack to {held / 2**20:,.0f} MiB or more"
        )
    return held


# -- models


def check_written_out(recording: Recording) -> None:
    """See that models in models, written out, stay a network of a size that can be worked with.

    Raises:
        ModelError: the network would have too many calls.
    """
    sizes: dict[int, int] = {}
    written = 0

    def size(inside: Recording) -> int:
        nonlocal written
        written += len(inside.calls)
        return sum(1 + nested(call.operation) for call in inside.calls)

    def nested(operation: Any) -> int:
        functional = functional_of(operation) if isinstance(operation, keras.Model) else None
        if functional is None:
            return 0
        if id(operation) not in sizes:
            sizes[id(operation)] = size(recorded(functional))
        return sizes[id(operation)]

    total = size(recording)
    if total > (most := max(_CALLS, _TIMES_WRITTEN * written)):
        raise ModelError(
            f"with its nested models written out the model makes {total:,} calls; {most:,} are possible for the "
            f"{written:,} that it states"
        )


def too_large_to_try(model: KerasModel, variables: Iterable[Any]) -> bool:
    """Whether running a model of a file on two samples would take far more memory than its weights.

    Args:
        model: in normal form.
        variables: its weights.
    """
    values = sum(_product(n or (2 if i == 0 else 8) for i, n in enumerate(s.shape)) for s in model.specs.values())
    weights = sum(_product(v.shape) for v in variables)
    return 4 * values > max(_COMPARED_BYTES, _TIMES_WEIGHTS * 4 * weights)


def _product(shape: Any) -> int:
    try:
        return math.prod(int(n) for n in ((shape,) if isinstance(shape, int) else shape))
    except (TypeError, ValueError):  # no shape: Keras says so
        return 0
