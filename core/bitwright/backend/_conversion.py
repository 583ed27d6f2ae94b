"""The one rule by which numbers become what a model takes: data sets, sessions and runtimes follow it alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError
from bitwright.files import Array


def array_of(value: object, where: str) -> Array:
    """A numpy array of what may be a tensor of any framework.

    Raises:
        InputError: it isn't numeric, or its rows differ in length.
    """
    if hasattr(value, "detach"):  # a torch tensor, perhaps on a device or with a gradient
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: can't be read as an array ({error})") from None
    check_numeric(array, where)
    return array


_LARGEST_INDEX = np.float64(2**53)
"""Beyond it floats don't know one class from the next, and 64 bits without a sign don't fit those with one."""


def class_indices(labels: object, where: str) -> NDArray[np.int64]:
    """Class indices, one a sample, of what users give as labels: integers, whole floats, booleans; a column too.

    Args:
        labels: an array, a sequence, or a tensor of any framework.
        where: what messages begin with.

    Raises:
        InputError: they aren't that.
    """
    if hasattr(labels, "detach"):
        labels = labels.detach().cpu()
    try:
        values = np.asarray(labels)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: labels can't be read as an array ({error})") from None
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise InputError(
            f"{where}: labels have shape (samples,), got {values.shape}: they are class indices, one a sample"
        )
    whole = values.dtype.kind in "biu" or (values.dtype.kind == "f" and bool((np.rint(values) == values).all()))
    if not whole or (values < 0).any() or (values > _LARGEST_INDEX).any():
        some = f" {values[:3]}…" if values.dtype.kind in "biuf" else ""
        raise InputError(
            f"{where}: labels are class indices, one a sample, non-negative integers; got {values.dtype}{some}"
        )
    return np.asarray(values, np.int64)


def check_numeric(array: Array, where: str) -> None:
    """Refuse text and objects.

    Raises:
        InputError: it holds no numbers.
    """
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise InputError(f"{where}: holds {array.dtype} values; give numbers")


def converted(values: Array, dtype: str, place: str) -> Array:
    """Convert where no value changes beyond float rounding: never out of range, never a fraction to an integer.

    Args:
        values: numbers.
        dtype: numpy's name of the type wanted; one that numpy doesn't know is left to the backend.
        place: what messages begin with.

    Raises:
        InputError: a value can't be converted so.
    """
    try:
        target = np.dtype(dtype)
    except TypeError:
        return np.asarray(values, order="C")  # a dtype that numpy doesn't know is the backend's to convert
    if values.dtype == target or values.size == 0:
        return np.asarray(values, target, order="C")
    if target.kind in "iu":
        info = np.iinfo(target)
        if values.dtype.kind not in "biu" and not (np.rint(values) == values).all():
            raise InputError(f"{place}: the model takes {dtype}, but the {values.dtype} values have fractions")
        # As Python's own numbers: numpy would bring the bounds into the type of the values, where they may overflow.
        if values.min().item() < info.min or values.max().item() > info.max:
            raise InputError(f"{place}: values outside {dtype} ({values.min()} to {values.max()})")
    elif target.kind == "f":
        ends = [float(values.min()), float(values.max())]
        if any(np.isfinite(e) and abs(e) > float(np.finfo(target).max) for e in ends):
            raise InputError(f"{place}: values too large for {dtype} ({values.min()} to {values.max()})")
    elif target.kind == "b" and not ((values == 0) | (values == 1)).all():
        raise InputError(f"{place}: the model takes booleans, but there are values other than 0 and 1")
    return np.asarray(values, target, order="C")


def fed(values: object, dtype: str, name: str) -> Array:
    """What a session feeds to an input or an inner tensor of the model: every backend converts by this rule.

    Numbers are converted where no value changes beyond float rounding: integers to floats, floats that are whole to
    integers, 0 and 1 to booleans.

    Args:
        values: of the batch; a tensor of any framework is read as an array.
        dtype: what the model takes, by numpy's name; one that numpy doesn't know is left to the backend.
        name: of the input, for messages.

    Raises:
        InputError: it isn't numeric, out of range, or holds fractions where integers are wanted.
    """
    array = values if isinstance(values, np.ndarray) else array_of(values, f"input {name!r}")
    if array.dtype == dtype:
        return array
    place = f"input {name!r}"
    check_numeric(array, place)
    return converted(array, dtype, place)
