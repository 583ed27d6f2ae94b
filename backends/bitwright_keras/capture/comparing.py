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

from bitwright.backend import Fault, alike, compare_capture, precision_of, user_state_kept
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

    def run(batch: Sequence[Any]) -> list[Any]:
        given = _tensors(normal, batch)
        try:
            return _arrays(model(substitute(normal.call, lambda ref: given[ref.id]), training=False))
        except Exception as error:  # without the frame that Keras puts around it
            raise ModelError(first_line(error)) from error

    def captured(batch: Sequence[Any]) -> list[Any]:
        values = _executed(normal, batch)
        return _arrays([values[t] for t in refs(normal.outputs)])

    specs = [(normal.specs[t].shape, normal.specs[t].dtype) for t in normal.inputs]
    dtypes = {spec.dtype for spec in normal.specs.values()}
    size = sum(int(np.prod(v.shape)) * 4 for v in model.variables)
    with as_it_was(model) as (restore, drew), user_state_kept(model, holders=(keras.Operation,)):
        finding = compare_capture(
            run, captured, specs, _flat(normal, sample), dtypes=dtypes, size=size, restore=restore, drew=drew
        )
        if finding is None:
            return
        if finding.fault is Fault.UNCHECKED and sample is not None:
            raise InputError(f"the sample doesn't fit the model: {finding.detail}")
        if finding.fault in (Fault.UNCHECKED, Fault.DRAWS):  # made-up numbers needn't suit the model
            more = "; give a sample, to have its capture checked" if finding.fault is Fault.UNCHECKED else ""
            warnings.warn(CaptureNotice(f"{normal.name!r}: {finding}{more}"), stacklevel=3)
            return
        culprit = _culprit(recording, normal, finding.batch, tensors, precision_of(dtypes))
    if culprit is not None and culprit not in traced:
        raise ModelError(
            f"the capture of layer {culprit!r} gives other results than the layer: it depends on what neither its "
            "configuration nor its weights tell; give its class a get_config() with all of its constructor's arguments "
            f"({finding})"
        )
    name = culprit or ", ".join(traced) or normal.name
    raise ModelError(f"{name!r} can't be captured: {finding}; compute with keras.layers and keras.ops only")


@contextmanager
def as_it_was(model: keras.Model) -> Iterator[tuple[Callable[[], None], Callable[[], bool]]]:
    """What calling a model may change (running statistics, random states) is put back at the end, or by the first
    function; the second says whether random states have changed."""
    held = [(v, keras.ops.convert_to_numpy(value_of(v))) for v in model.non_trainable_variables if v.dtype != "string"]

    def changed() -> Iterator[tuple[keras.Variable, Any]]:
        for variable, value in held:
            now = keras.ops.convert_to_numpy(value_of(variable))
            if not np.array_equal(now, value, equal_nan=value.dtype.kind == "f"):
                yield variable, value

    def restore() -> None:
        for variable, value in changed():
            variable.assign(value)

    try:
        yield restore, lambda: any("seed_generator" in v.path for v, _ in changed())
    finally:
        restore()


def _flat(normal: KerasModel, sample: Any) -> list[Any] | None:
    """A sample's arrays in the order of the inputs."""
    if sample is None:
        return None
    flat = [sample[t] for t in normal.inputs] if isinstance(sample, Mapping) else keras.tree.flatten(sample)
    return [np.asarray(x) for x in flat]


def _tensors(normal: KerasModel, batch: Sequence[Any]) -> dict[str, Any]:
    """A batch as tensors by the input's name."""
    pairs = zip(normal.inputs, batch, strict=True)
    return {t: keras.ops.convert_to_tensor(x, dtype=normal.specs[t].dtype) for t, x in pairs}


def _executed(normal: KerasModel, batch: Sequence[Any]) -> dict[str, Any]:
    """All that a capture computes, by name."""
    values = _tensors(normal, batch)
    execute(normal.nodes, values)
    return values


def _arrays(results: Any) -> list[Any]:
    return [as_numpy(x) for x in keras.tree.flatten(results)]


def _culprit(
    recording: Recording,
    normal: KerasModel,
    batch: Sequence[Any],
    tensors: Mapping[int, str],
    precision: float,
) -> str | None:
    """The first of the user's layers whose results differ, each given what the user's layers before it computed."""
    found = _executed(normal, batch)
    values = {id(t): found[tensors[id(t)]] for t in recording.inputs}
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
            if mine is not None and not alike([as_numpy(result)], [as_numpy(mine)], precision):
                return str(call.operation.name)
    return None
