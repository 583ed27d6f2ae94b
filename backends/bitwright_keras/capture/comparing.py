"""What was captured against the model that it was captured from, on one batch.

A capture that computes something else is refused, with the layer's name: whatever a layer does in Python, no wrong
float model gets further than this. The model is as it was afterwards, running statistics and random states included.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from bitwright.backend import alike, precision_of, trial_batches
from bitwright.errors import InputError, ModelError
from bitwright_keras.capture.tracing import Recording
from bitwright_keras.capture.training_mode import takes_training
from bitwright_keras.graph.engine import as_numpy, value_of
from bitwright_keras.graph.model import KerasModel, execute, refs, substitute
from bitwright_keras.graph.native import first_line


class CaptureNotice(UserWarning):
    """What capturing had to leave as it is, or couldn't check."""


def compare(
    model: keras.Model,
    normal: KerasModel,
    sample: Any,
    recording: Recording,
    tensors: Mapping[int, str],
    traced: Sequence[str],
) -> None:
    """Refuse a capture that computes something else than the model does in inference.

    Args:
        model: the user's.
        normal: what was captured.
        sample: one batch; without one, numbers are made up.
        recording: the calls of the user's model.
        tensors: the capture's id of each tensor of the recording, by the tensor's `id`.
        traced: names of layers whose `call` was recorded.

    Raises:
        InputError: the sample doesn't fit the model.
        ModelError: the results differ.
    """
    with as_it_was(model) as restore:
        batch, expected, said = None, [], ""
        for made in _batches(normal, sample):
            try:
                expected = _outputs(model, normal, made)
                batch = made
                break
            except Exception as error:
                said = said or first_line(error)
        if batch is None and sample is not None:
            raise InputError(f"the sample doesn't fit the model: {said}")
        if batch is None:  # made-up numbers needn't suit the model
            notice = f"{normal.name!r} runs on no made-up numbers ({said}): give a sample, to have its capture checked"
            warnings.warn(CaptureNotice(notice), stacklevel=3)
            return
        precision = precision_of(spec.dtype for spec in normal.specs.values())
        values: dict[str, Any] = dict(batch)
        execute(normal.nodes, values)
        found = [values[t] for t in refs(normal.outputs)]
        # What a call leaves in Python is put back when it is recorded: that it counts shows in another call.
        asked_again = bool(traced) or not recording.replayed
        if _alike(expected, found, precision) and not (
            asked_again and not _alike(expected, _outputs(model, normal, batch), precision)
        ):
            return
        if _draws(expected, lambda: _outputs(model, normal, batch), restore, precision):
            notice = f"{normal.name!r} draws random numbers in inference, so that its capture can't be checked"
            warnings.warn(CaptureNotice(notice), stacklevel=3)
            return
        culprit = _culprit(recording, normal, batch, values, tensors, precision)
    if culprit is not None and culprit not in traced:
        raise ModelError(
            f"the capture of layer {culprit!r} gives other results than the layer: it depends on what neither its "
            "configuration nor its weights tell; give its class a get_config() with all of its constructor's arguments"
        )
    raise ModelError(
        f"capturing {culprit or ', '.join(traced) or normal.name!r} through call() gives other results than "
        "calling it: it depends on Python state, on values, or on the batch's shape; compute with keras.layers and "
        "keras.ops only"
    )


def _outputs(model: keras.Model, normal: KerasModel, batch: Mapping[str, Any]) -> list[Any]:
    return list(keras.tree.flatten(model(substitute(normal.call, lambda ref: batch[ref.id]), training=False)))


@contextmanager
def as_it_was(model: keras.Model) -> Iterator[Callable[[], None]]:
    """What calling a model may change (running statistics, random states) is put back at the end, or by a call."""
    held = [(v, keras.ops.convert_to_numpy(value_of(v))) for v in model.non_trainable_variables if v.dtype != "string"]

    def restore() -> None:
        for variable, value in held:
            now = keras.ops.convert_to_numpy(value_of(variable))
            if not np.array_equal(now, value, equal_nan=value.dtype.kind == "f"):
                variable.assign(value)

    try:
        yield restore
    finally:
        restore()


def _draws(first: Sequence[Any], run: Callable[[], Any], restore: Callable[[], None], precision: float) -> bool:
    """Whether a model's results change from call to call, but for the state of its random generators."""
    if _alike(first, run(), precision):
        return False
    restore()
    return _alike(first, run(), precision)


def _alike(expected: Sequence[Any], found: Sequence[Any], precision: float) -> bool:
    return alike([as_numpy(x) for x in expected], [as_numpy(x) for x in found], precision)


def _batches(normal: KerasModel, sample: Any) -> Iterator[dict[str, Any]]:
    """The sample, or batches that are made up, as tensors by name."""
    given = None
    if sample is not None:
        flat = [sample[t] for t in normal.inputs] if isinstance(sample, Mapping) else keras.tree.flatten(sample)
        given = [np.asarray(x) for x in flat]
    specs = [(normal.specs[t].shape, normal.specs[t].dtype) for t in normal.inputs]
    for batch in trial_batches(specs, given):
        tensors = (keras.ops.convert_to_tensor(x, dtype=dtype) for x, (_, dtype) in zip(batch, specs, strict=True))
        yield dict(zip(normal.inputs, tensors, strict=True))


def _culprit(
    recording: Recording,
    normal: KerasModel,
    batch: Mapping[str, Any],
    found: Mapping[str, Any],
    tensors: Mapping[int, str],
    precision: float,
) -> str | None:
    """The first of the user's layers whose results differ, each given what the user's layers before it computed."""
    values = {id(t): batch[tensors[id(t)]] for t in recording.inputs}
    for call in recording.calls:
        args, kwargs = keras.tree.map_structure(
            lambda x: values.get(id(x)) if isinstance(x, keras.KerasTensor) else x, (call.args, dict(call.kwargs))
        )
        if recording.replayed and takes_training(call.operation):
            kwargs["training"] = False
        try:
            results = keras.tree.flatten(call.operation(*args, **kwargs))
        except Exception:
            return None
        for tensor, result in zip(call.outputs, results, strict=True):
            values[id(tensor)] = result
            mine = found.get(tensors.get(id(tensor), ""))
            if mine is not None and not _alike([result], [mine], precision):
                return str(call.operation.name)
    return None
