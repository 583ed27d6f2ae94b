"""Bringing a Keras model into normal form: its recorded calls are made again on fresh symbolic tensors, each by
copies of the user's layers, with composite ones spelled out on the way (`expand`).

- Nested models are inlined; "conv" in "block" becomes "block/conv".
- Subclassed models and layers, and custom layers that have only sublayers, are recorded through their `call` on
  symbolic tensors.
- All is as in inference: `training` is False unless a `call` says otherwise.
- The result is compared with the original on a batch.
- Masks that Keras passes along unseen become arguments.
- What can't be looked into (Lambda, custom layers with weights of their own, recurrent layers) stays one opaque call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import keras

from bitwright.errors import ModelError
from bitwright.graph import ParamId, free_name
from bitwright_keras.capture.bombs import check_written_out, too_large_to_try
from bitwright_keras.capture.comparing import CaptureNotice, as_it_was, compare
from bitwright_keras.capture.expand import EXPANSIONS
from bitwright_keras.capture.opening import recording_of
from bitwright_keras.capture.tracing import Call, Recording, functional_of, history, recorded, trace
from bitwright_keras.capture.training_mode import (
    default_mode,
    differs_in_training,
    mode_of,
    takes_training,
    without_training,
)
from bitwright_keras.graph.constants import constant_params
from bitwright_keras.graph.engine import value_of
from bitwright_keras.graph.model import KerasModel, Node, Ref, Spec, pruned, refs, variables_of
from bitwright_keras.graph.native import copy_layer, copy_of, counterparts, input_of


def normalize(model: keras.Model, sample: Any = None) -> KerasModel:
    """A copy of a model in normal form.

    Args:
        model: any built Keras model; it isn't changed.
        sample: one batch, for a subclassed model that was never called, and to compare the capture on.

    Raises:
        InputError: the sample doesn't fit.
        ModelError: the model can't be captured, is quantized already, or is too large with nested models written out.
    """
    with as_it_was(model):
        return _normalized(model, sample, from_file=False)


def normalize_file(model: keras.Model, sample: Any = None) -> KerasModel:
    """As `normalize`, of a model that may come from anybody: it isn't run on made-up numbers where that would take far
    more memory than its weights.

    Raises:
        InputError, ModelError: as `normalize`.
    """
    with as_it_was(model):
        return _normalized(model, sample, from_file=True)


def _normalized(model: keras.Model, sample: Any, *, from_file: bool) -> KerasModel:
    recording, original = recording_of(model, sample)
    check_written_out(recording)
    made = Normalizer()
    names: dict[str, Any] = {}
    for index, tensor in enumerate(recording.inputs):
        name = _input_name(tensor, index)
        if name in names:
            raise ModelError(f"two inputs of the model are called {name!r}; names must be unique")
        names[name] = tensor
    symbols = {name: input_of(name, Spec(tuple(t.shape), t.dtype)) for name, t in names.items()}
    for name, symbol in symbols.items():
        made.declare(name, symbol)
    by_tensor = {id(t): symbols[name] for name, t in names.items()}
    with warnings.catch_warnings():
        # Masks are arguments here, so that none is lost where a layer doesn't hand it on.
        warnings.filterwarnings("ignore", message=".*does not support masking.*")
        outputs = made.inline(recording, by_tensor, "")
    result = KerasModel(
        model.name,
        tuple(names),
        _structure(recording.inputs_structure, {id(t): Ref(name) for name, t in names.items()}, recording.replayed),
        pruned(made.nodes, refs(made.references(outputs))),
        made.references(outputs),
        made.specs,
    )
    used = set(result.inputs).union(*(n.outputs for n in result.nodes))
    result = replace(result, specs={t: s for t, s in result.specs.items() if t in used})
    tensors = {key: t for key, t in made.places.items() if t in used}
    if from_file and sample is None and too_large_to_try(result, original.variables):
        notice = (
            f"{result.name!r} is too large to be run on made-up numbers: give a sample, to have its capture checked"
        )
        warnings.warn(CaptureNotice(notice), stacklevel=3)
    else:
        compare(original, result, sample, recording, tensors, made.traced)
    return result


def _structure(structure: Any, names: Mapping[int, Ref], replayed: bool) -> Any:
    """How the model takes its inputs; a captured `call` takes its first argument."""
    found = keras.tree.map_structure(lambda x: names.get(id(x), x), structure)
    if replayed:
        return found
    args, kwargs = found
    return args[0] if len(args) == 1 and not kwargs else (*args, *kwargs.values())


def _input_name(tensor: Any, index: int) -> str:
    operation = getattr(getattr(tensor, "_keras_history", None), "operation", None)
    return str(operation.name) if operation is not None else str(tensor.name or f"input_{index}")


class Normalizer:
    """Makes calls again, one canonical thing at a time.

    Attributes:
        nodes: the calls so far.
        specs: shapes and types of the activations so far.
        traced: names of layers whose `call` was recorded.
        places: the activation that each tensor of the model's own recording has become, by the tensor's `id`.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.specs: dict[str, Spec] = {}
        self.traced: list[str] = []
        self.places: dict[int, str] = {}
        self._ids: dict[int, str] = {}
        self._kept: list[Any] = []  # ids of objects are only good while these live
        self._layers: dict[tuple[int, str], tuple[keras.layers.Layer, dict[str, ParamId]]] = {}
        self._names: dict[tuple[int, str], str] = {}
        self._taken: set[str] = set()
        self._files: set[str] = set()

    # -- recordings

    def inline(self, recording: Recording, given: Mapping[int, Any], prefix: str, training: bool = False) -> Any:
        """Make a recording's calls; returns its outputs.

        Args:
            recording: of the user's layers.
            given: symbolic tensors by `id` of the recording's inputs.
            prefix: of the names, "block/".
            training: what the recorded model or layer is called with.
        """
        values = dict(given)
        for call in recording.calls:
            if any(id(x) not in values for x in _symbols((call.args, call.kwargs))):
                continue
            args, kwargs = keras.tree.map_structure(
                lambda x: values[id(x)] if isinstance(x, keras.KerasTensor) else x, (call.args, dict(call.kwargs))
            )
            mode = training if recording.replayed else mode_of(call.operation, args, kwargs, training)
            results = keras.tree.flatten(self.apply(call, args, kwargs, prefix, mode))
            for tensor, result in zip(call.outputs, results, strict=True):
                values[id(tensor)] = result
        if not prefix:
            self.places = {key: self._ids[id_of(x)] for key, x in values.items() if id_of(x) in self._ids}
        return keras.tree.map_structure(lambda x: values[id(x)], recording.outputs)

    def apply(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], prefix: str, training: bool = False
    ) -> Any:
        """One call of the user's, on new tensors."""
        operation = call.operation
        name = self.name(operation, prefix, call.index)
        args, kwargs = self._plain(args, kwargs, name)
        if takes_training(operation):
            args, kwargs = without_training(operation, args, kwargs)
        if isinstance(operation, keras.Model):
            return self._model(operation, args, kwargs, name, training)
        if not isinstance(operation, keras.layers.Layer):
            expansion = EXPANSIONS.get(type(operation).__name__) if _of_keras(operation) else None
            made = expansion(self, operation, name, args, kwargs) if expansion is not None else None
            return self.emit(name, copy_of(operation), *args, **kwargs) if made is None else made
        if getattr(operation, "quantization_mode", None) is not None:
            raise ModelError(
                f"layer {operation.name!r} is quantized already ({operation.quantization_mode}); start from the float "
                "model"
            )
        if _of_keras(operation) and training and differs_in_training(operation):
            raise ModelError(
                f"layer {name!r} ({type(operation).__name__}) is called with training=True in inference: what it "
                "computes then depends on chance or on the other samples of a batch, which no exported model can hold; "
                "pass it the model's own training argument"
            )
        self._masks(operation, args, kwargs)
        if _of_keras(operation):
            expansion = EXPANSIONS.get(type(operation).__name__)
            if expansion is not None:
                made = expansion(self, operation, name, args, kwargs)
                if made is not None:
                    return made
        elif (made := self._composite(operation, args, kwargs, name, training)) is not None:
            return made
        elif training and (takes_training(operation) or operation._layers):
            raise ModelError(
                f"layer {name!r} ({type(operation).__name__}) is called with training=True in inference, and what it "
                "then does can't be looked into; pass it the model's own training argument"
            )
        layer, params = self.layer(operation, name, called=(args, kwargs))
        if takes_training(operation) and (not _of_keras(operation) or default_mode(operation)):
            kwargs["training"] = False
        return self.emit(name, layer, *args, params=params, **kwargs)

    def _model(
        self, model: keras.Model, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, training: bool
    ) -> Any:
        functional = functional_of(model)
        if functional is None:
            return self._traced(model, args, kwargs, name, training)
        recording = recorded(functional)
        given = args[0] if args else kwargs.get("inputs", kwargs.get("x"))
        flat = keras.tree.flatten(given)
        given = {id(t): x for t, x in zip(recording.inputs, flat, strict=True)}
        return self.inline(recording, given, f"{name}/", training)

    def _traced(
        self, layer: keras.layers.Layer, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, training: bool
    ) -> Any:
        recording = trace(layer, args, kwargs, training)
        flat = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
        given = {id(t): x for t, x in zip(recording.inputs, flat, strict=True)}
        result = self.inline(recording, given, f"{name}/", training)
        self.traced.append(name)
        return result

    def _composite(
        self, layer: keras.layers.Layer, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, training: bool
    ) -> Any:
        """A custom layer that has only sublayers, by its `call`; None where it can't be recorded."""
        inner = [x for x in layer._layers if x.weights]
        own = {id(v) for v in layer.weights} - {id(v) for x in inner for v in x.weights}
        if not inner or own or _of_keras(layer):
            return None
        mark = len(self.nodes), len(self.traced)
        try:
            return self._traced(layer, args, kwargs, name, training)
        except ModelError as error:
            if training:
                raise
            del self.nodes[mark[0] :], self.traced[mark[1] :]
            warnings.warn(CaptureNotice(f"{error}; it runs in float as one op"), stacklevel=2)
            return None

    # -- calls

    def emit(
        self, name: str, operation: Any, *args: Any, params: Mapping[str, ParamId] | None = None, **kwargs: Any
    ) -> Any:
        """Make one call of the normal form.

        Args:
            name: the op's id.
            operation: a layer of the normal form, or a `keras.ops` operation or function.
            args, kwargs: with the normal form's symbolic tensors.
            params: parameter ids by variable; by default those of a layer's own name.
        """
        result = operation(*args, **kwargs)
        tensors = keras.tree.flatten(result)
        if not isinstance(operation, keras.Operation):  # what the function made of its arguments
            call = history(tensors[0])
            assert call is not None
            operation, args, kwargs = call.operation, call.args, dict(call.kwargs)
        if not isinstance(operation, keras.layers.Layer):
            operation.name = self.file_name(name)
        name = self.unique(name)
        outputs = (name,) if len(tensors) == 1 else tuple(f"{name}:{i}" for i in range(len(tensors)))
        for id, tensor in zip(outputs, tensors, strict=True):
            self.declare(id, tensor)
        new_args, new_kwargs = self.references((args, kwargs))
        if params is None and isinstance(operation, keras.layers.Layer):
            params = {key: f"{name}/{key}" for key in variables_of(operation)}
        node = Node(name, operation, new_args, new_kwargs, outputs, dict(params or {}))
        self.nodes.append(constant_params(node))
        return result

    def layer(
        self,
        source: keras.layers.Layer,
        name: str,
        part: str = "",
        make: Callable[[str], keras.layers.Layer] | None = None,
        params: Mapping[str, ParamId] | None = None,
        called: tuple[Any, Any] | None = None,
    ) -> tuple[keras.layers.Layer, Mapping[str, ParamId]]:
        """The normal form's layer for (a part of) the user's; the same one each time that a shared layer is called.

        Args:
            source: the user's layer.
            name: op id, from which the layer's name is made at first.
            part: which part.
            make: makes it, given its name; by default a copy.
            params: parameter ids by variable, where they aren't "name/variable".
            called: arguments of the user's layer, which a copy may have to be called with to be built.
        """
        key = (id(source), part)
        if key not in self._layers:
            file_name = self.file_name(name)
            made = copy_layer(source, called=called, name=file_name) if make is None else make(file_name)
            if params is None and made.built:
                params = {key: f"{name}/{own}" for key, own in _own_names(made, source, copied=make is None).items()}
            self._layers[key] = (made, dict(params or {}))
            self._kept.append(source)
        return self._layers[key]

    def name(self, operation: keras.Operation, prefix: str, index: int) -> str:
        """Op id of a call: the first call's name, with a number from the second call on."""
        key = (id(operation), prefix)
        self._kept.append(operation)
        first = self._names.setdefault(key, f"{prefix}{operation.name}")
        return first if index == 0 else f"{first}_{index}"

    def unique(self, name: str) -> str:
        """A free op id: this one, or with a number."""
        found = free_name(name, self._taken | self.specs.keys())
        self._taken.add(found)
        return found

    def file_name(self, name: str) -> str:
        """A free name for a layer or operation in files; Keras allows no "/" there."""
        found = free_name(name.replace("/", "_"), self._files)
        self._files.add(found)
        return found

    def declare(self, id: str, tensor: Any) -> None:
        """Give a symbolic tensor its id."""
        self._ids[id_of(tensor)] = id
        self._kept.append(tensor)
        self.specs[id] = Spec(tuple(tensor.shape), keras.backend.standardize_dtype(tensor.dtype))
        if id not in self._files and "/" not in id:
            self._files.add(id)

    def references(self, structure: Any) -> Any:
        """A structure with `Ref`s in place of symbolic tensors; those that Keras computed unseen are taken up."""

        def reference(x: Any) -> Any:
            if not isinstance(x, keras.KerasTensor):
                return x
            if id_of(x) not in self._ids:
                self._take_up(x)
            return Ref(self._ids[id_of(x)])

        return keras.tree.map_structure(reference, structure)

    def _take_up(self, tensor: Any) -> None:
        """Record a tensor (a mask) that a layer computed beside its output."""
        call = history(tensor)
        if call is None:
            raise ModelError(f"the symbolic tensor {tensor.name!r} isn't computed from the model's inputs")
        args, kwargs = self.references((call.args, dict(call.kwargs)))
        name = self.unique(f"mask/{type(call.operation).__name__.lower()}")
        call.operation.name = self.file_name(name)
        outputs = (name,) if len(call.outputs) == 1 else tuple(f"{name}:{i}" for i in range(len(call.outputs)))
        for id, x in zip(outputs, call.outputs, strict=True):
            self.declare(id, x)
        self.nodes.append(Node(name, call.operation, args, kwargs, outputs))

    # -- arguments

    def _plain(self, args: Any, kwargs: Any, name: str) -> Any:
        """Arguments with variables and framework tensors as numpy constants."""

        def plain(x: Any) -> Any:
            if isinstance(x, keras.Variable):
                if x.trainable:
                    notice = f"variable {x.path!r}, which {name!r} reads, isn't a layer's own: a constant here"
                    warnings.warn(CaptureNotice(notice), stacklevel=2)
                return keras.ops.convert_to_numpy(value_of(x))
            if isinstance(x, keras.KerasTensor) or not keras.ops.is_tensor(x):
                return x
            return keras.ops.convert_to_numpy(x)

        return keras.tree.map_structure(plain, (args, kwargs))

    def _masks(self, layer: keras.layers.Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pass the masks that Keras would hand on unseen, of a list of inputs too."""
        if len(args) != 1 or "mask" not in layer._call_signature.parameters or kwargs.get("mask") is not None:
            return
        found = keras.tree.map_structure(
            lambda x: getattr(x, "_keras_mask", None) if isinstance(x, keras.KerasTensor) else None, args[0]
        )
        if any(mask is not None for mask in keras.tree.flatten(found)):
            kwargs["mask"] = found


def _own_names(made: keras.layers.Layer, source: keras.layers.Layer, *, copied: bool) -> dict[str, str]:
    """The user's name of each variable of a layer of the normal form, by its name there."""
    variables = variables_of(made)
    if not copied:
        return {key: key for key in variables}
    theirs = {id(v): key for key, v in variables_of(source).items()}
    named = {id(a): theirs[id(b)] for a, b in counterparts(made, source) or ()}
    return {key: named.get(id(v), key) for key, v in variables.items()}


def id_of(tensor: Any) -> int:
    """Identity of a symbolic tensor."""
    return id(tensor)


def _symbols(structure: Any) -> list[Any]:
    return [x for x in keras.tree.flatten(structure) if isinstance(x, keras.KerasTensor)]


def _of_keras(operation: keras.Operation) -> bool:
    return type(operation).__module__.partition(".")[0] == "keras"
