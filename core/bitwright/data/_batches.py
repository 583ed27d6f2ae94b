"""One batch: from what the user's iterable yields to arrays by input name, checked and converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import numpy as np

from bitwright.backend import Batch, Feed, FeedSpecs, array_of, check_numeric, converted
from bitwright.errors import InputError
from bitwright.files import Array
from bitwright.graph import Graph

V = TypeVar("V")

InputSpecs = Mapping[str, tuple[tuple[int | None, ...], str]]
"""Shape (None: free) and dtype of each model input."""


WAYS = "a list of them, a folder with one .npz each, or arrays that stack them along a new first axis"
"""How whole feeds are given."""


def single_input(specs: InputSpecs) -> str:
    """The name of the model's one input.

    Raises:
        InputError: it has several.
    """
    if len(specs) != 1:
        raise InputError(
            f"one array for a model with {len(specs)} inputs; give a mapping with {', '.join(map(repr, specs))}, "
            "or a list of batches that are tuples in this order"
        )
    return next(iter(specs))


def require_ranks(graph: Graph, specs: InputSpecs) -> None:
    """Refuse a model whose inputs don't say how many axes they have: data can't be told from samples of data there.

    Raises:
        InputError: an input's shape is unknown altogether.
    """
    for name, (shape, _) in specs.items():
        if not shape and name in graph.tensors and graph.tensors[name].shape is None:
            raise InputError(
                f"the model says nothing of the shape of its input {name!r}, not even how many axes it has: give it "
                "one where the model is made, with None for axes that are free"
            )


def in_names_of(specs: InputSpecs, arrays: Mapping[str, V]) -> dict[str, V]:
    """Arrays under the model's own input names: TensorFlow's "x:0" is the first output of "x", and goes by both."""

    def known(name: str) -> str:
        if name in specs:
            return name
        other = name.removesuffix(":0") if name.endswith(":0") else f"{name}:0"
        return other if other in specs and other not in arrays else name

    return {known(str(name)): values for name, values in arrays.items()}


def one_run(specs: InputSpecs) -> bool:
    """Whether the inputs' first axes aren't samples of one batch: an input is a scalar, two fix different sizes,
    or the backend says so.

    So it is with streaming models: frames with time first, recurrent states, a sampling rate; and with
    detectors, whose images come in a list. Data are whole feeds
    then, one for each run of the model, and are never cut or joined.
    """
    if isinstance(specs, FeedSpecs):
        return True
    return any(not shape for shape, _ in specs.values()) or len(_fixed_sizes(specs)) > 1


def batch_dimension(specs: InputSpecs) -> int | None:
    """The batch size that the model fixes; None where it is free, or where first axes aren't samples (`one_run`)."""
    return None if one_run(specs) else next(iter(_fixed_sizes(specs)), None)


def _fixed_sizes(specs: InputSpecs) -> set[int]:
    return {shape[0] for shape, _ in specs.values() if shape and shape[0] is not None}


def samples_in(batch: Batch) -> int:
    """How many samples a batch holds: the common length of first axes; 1 where they have none (a whole feed)."""
    if isinstance(batch, Feed):
        return 1
    lengths = {np.shape(v)[0] if np.ndim(v) else None for v in batch.values()}
    length = next(iter(lengths)) if len(lengths) == 1 else None
    return 1 if length is None else length


def first_samples(batch: Batch, count: int) -> Batch:
    """The first so many samples of a batch; a whole feed stays whole."""
    if isinstance(batch, Feed) or count >= samples_in(batch) or len({np.shape(v)[:1] for v in batch.values()}) > 1:
        return batch
    return {name: values[:count] for name, values in batch.items()}


def is_feed(batch: Batch, specs: InputSpecs) -> bool:
    """Whether a batch is one whole feed: of a model of `one_run`, or of one of which some inputs fix their first axis
    and others don't, where the lengths differ."""
    if one_run(specs):
        return True
    mixed = bool(_fixed_sizes(specs)) and any(shape[0] is None for shape, _ in specs.values())
    return mixed and len({np.shape(v)[:1] for v in batch.values()}) > 1


def stacked(batch: Batch, specs: InputSpecs, where: str) -> list[Batch] | None:
    """The feeds of arrays that stack them along a new first axis; None where they don't.

    With models of `one_run`, arrays without that axis are the same in all feeds.

    Raises:
        InputError: the arrays stack different numbers of feeds.
    """
    deeper = {n for n, (shape, _) in specs.items() if np.ndim(batch[n]) == len(shape) + 1}
    plain = {n for n, (shape, _) in specs.items() if np.ndim(batch[n]) == len(shape)}
    if not deeper or deeper | plain != set(specs) or (plain and not one_run(specs)):
        return None
    lengths = {n: len(batch[n]) for n in specs if n in deeper}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{n!r} {length}" for n, length in lengths.items())
        raise InputError(f"{where}: the arrays stack different numbers of feeds along their first axis: {told}")
    count = next(iter(lengths.values()))
    return [{n: batch[n][i] if n in deeper else batch[n] for n in specs} for i in range(count)]


def named_batch(item: object, specs: InputSpecs, where: str) -> Batch:
    """A batch as the user's iterable gives it (mapping, array, tuple, list) → arrays by input name.

    Raises:
        InputError: names are missing or unknown, or there are fewer elements than inputs.
    """
    if isinstance(item, Mapping):
        item = in_names_of(specs, opened_up(item, specs))
        if missing := [n for n in specs if n not in item]:
            raise InputError(f"{where}: no array for input {missing[0]!r}; it holds {', '.join(map(str, item))}")
        return {n: array_of(item[n], f"{where}, input {n!r}") for n in specs}
    if isinstance(item, tuple | list) and not (item and all(np.isscalar(x) for x in item)):
        return {n: array_of(v, f"{where}, input {n!r}") for n, v in _in_order(item, specs, where)}
    return {single_input(specs): array_of(item, where)}


def opened_up(item: Mapping[Any, object], specs: InputSpecs) -> dict[str, object]:
    """A mapping in which nested ones, and lists, are named by the way to them: ``{"q": {"ids": x}}`` → "q.ids"."""
    found: dict[str, object] = {}
    for key, value in item.items():
        name = str(key)
        if name not in specs and any(spec.startswith(f"{name}.") for spec in specs):
            inner = value if isinstance(value, Mapping) else dict(enumerate(value)) if _is_list(value) else None
            if inner is not None:
                if _is_list(value):
                    _check_elements(name, value, specs)
                found |= opened_up({f"{name}.{k}": v for k, v in inner.items()}, specs)
                continue
        found[name] = value
    return found


def _check_elements(name: str, value: Sequence[object], specs: InputSpecs) -> None:
    taken = {spec.removeprefix(f"{name}.").partition(".")[0] for spec in specs if spec.startswith(f"{name}.")}
    if any(str(place) not in taken for place in range(len(value))):
        raise InputError(
            f"{name!r} has {len(value)} elements, and the model was opened on a sample with {len(taken)}: give "
            f"{'each as a feed of its own' if len(taken) == 1 else f'feeds of {len(taken)}'}, or open the model on a "
            f"sample with {len(value)}"
        )


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, tuple | list)


def _arguments(item: Sequence[object], specs: InputSpecs) -> list[object]:
    """A batch's elements, one for each input: where an argument is a list or mapping of arrays, as images are to a
    detector, its inputs are "images.0", "images.1", …, and the element for it is taken apart in that order."""
    names: dict[str, list[str]] = {}
    for name in specs:
        names.setdefault(name.partition(".")[0], []).append(name)
    if len(item) < len(names) or [n for own in names.values() for n in own] != list(specs):
        return list(item)
    found: list[object] = []
    for value, (argument, own) in zip(item, names.items(), strict=False):
        inside = own != [argument] and (isinstance(value, Mapping) or (_is_list(value) and f"{argument}.0" in own))
        if not inside:
            if len(own) > 1:
                return list(item)  # the names only happen to begin alike
            found.append(value)
            continue
        named = opened_up({argument: value}, specs)
        if any(name not in named for name in own):
            return list(item)
        found += [named[name] for name in own]
    return found


def _in_order(item: Sequence[object], specs: InputSpecs, where: str) -> list[tuple[str, object]]:
    item = _arguments(item, specs)
    if len(item) < len(specs):
        raise InputError(f"{where}: {len(item)} elements for {len(specs)} inputs ({', '.join(specs)})")
    return list(zip(specs, item, strict=False))


def check_batch(
    batch: Batch,
    specs: InputSpecs,
    where: str,
    *,
    any_length: bool = False,
    first_sample: int = 0,
    whole: bool = False,
) -> Batch:
    """Check ranks, fixed dimensions, lengths, dtypes and finiteness; returns contiguous arrays of the model's dtypes.

    Args:
        batch: arrays by input name, one for each input.
        specs: what the model takes.
        where: what messages begin with.
        any_length: accept any number of samples, where the model fixes it.
        first_sample: index of the first sample, for messages.
        whole: the batch is one feed (`is_feed`): first axes are no samples.

    Raises:
        InputError: something doesn't fit; names the place, the input and the reason.
    """
    checked = {}
    for name, (shape, dtype) in specs.items():
        values, place = batch[name], f"{where}, input {name!r}"
        _check_shape(values, shape, place, any_length and not whole, whole)
        check_numeric(values, place)
        _check_finite(values, place, None if whole else first_sample)
        checked[name] = converted(values, dtype, place)
    if whole:
        return Feed(checked)
    lengths = {name: len(values) for name, values in checked.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name!r} {n}" for name, n in lengths.items())
        raise InputError(
            f"{where}: the inputs hold different numbers of samples: {told}; where axis 0 isn't samples, give whole "
            f"feeds: {WAYS}"
        )
    return checked


def _check_shape(
    values: Array, shape: tuple[int | None, ...], place: str, any_length: bool, whole: bool = False
) -> None:
    expected = "[" + ", ".join("?" if n is None else str(n) for n in shape) + "]"
    if values.ndim != len(shape):
        hint = ""
        if values.ndim == len(shape) - 1:
            hint = "; add an axis in front, x[None]" if whole else _missing_axis(values.shape, shape)
        raise InputError(f"{place}: shape {list(values.shape)}, but the model takes {expected}{hint}")
    for axis, (n, wanted) in enumerate(zip(values.shape, shape, strict=True)):
        if wanted is not None and n != wanted and not (axis == 0 and any_length):
            hint = f"; first axes aren't samples of this model, so give whole feeds: {WAYS}" if whole else ""
            raise InputError(f"{place}: shape {list(values.shape)}, but the model takes {expected} (axis {axis}){hint}")
    if values.size == 0:
        raise InputError(f"{place}: the array is empty, shape {list(values.shape)}")


def _missing_axis(found: tuple[int, ...], expected: tuple[int | None, ...]) -> str:
    """Which axis to add: that of samples, unless only one of length one elsewhere, such as one channel, fits."""

    def fits(left: tuple[int | None, ...]) -> bool:
        return all(m in (None, n) for n, m in zip(found, left, strict=True))

    places = (k for k in range(1, len(expected)) if expected[k] == 1 and fits(expected[:k] + expected[k + 1 :]))
    if not fits(expected[1:]) and (place := next(places, None)) is not None:
        return f"; add its axis {place}, of length 1: x[{':, ' * place}None]"
    return "; add a samples axis in front, x[None]"


def _check_finite(values: Array, place: str, first_sample: int | None) -> None:
    if values.dtype.kind in "biu" or (np.isfinite(values.min()) and np.isfinite(values.max())) or _is_mask(values):
        return
    kind = "NaN" if np.isnan(values).any() else "infinite"
    if first_sample is None or values.ndim == 0:
        raise InputError(f"{place}: {kind} values ({int((~np.isfinite(values)).sum())} of {values.size})")
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    raise InputError(f"{place}: {kind} values in sample {first_sample + int(bad.argmax())} ({int(bad.sum())} such)")


def _is_mask(values: Array) -> bool:
    """Whether an array holds zeros and −∞ and nothing else: an attention mask. In other places the −∞ is noticed
    where it arrives, with the tensor's name."""
    return bool(values.max() == 0 and ((values == 0) | (values == -np.inf)).all())


def joined(parts: Sequence[Array]) -> Array:
    """An output over several batches: along the first axis, or stacked where it has none; one batch's as it is."""
    if len(parts) == 1:
        return parts[0]
    return np.stack(parts) if parts[0].ndim == 0 else np.concatenate(parts)
