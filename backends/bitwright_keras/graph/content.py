"""What a model in normal form computes beyond its parameters' values, as a fingerprint."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import keras
import numpy as np

from bitwright.graph import ParamId
from bitwright.runs import fingerprint
from bitwright_keras.graph.canonical import canonical
from bitwright_keras.graph.engine import value_of
from bitwright_keras.graph.model import KerasModel, Node, substitute, variables_of


def content(model: KerasModel) -> str:
    """Hash of its calls with their settings and literal arguments, of the code of classes that aren't Keras's own, and
    of the variables that no parameter shows."""
    shown = canonical(model).graph.params
    return fingerprint.of_json([_call(node, shown) for node in model.nodes])


def _call(node: Node, shown: Container[ParamId]) -> list[Any]:
    operation = node.operation
    kind = type(operation)
    arguments = substitute((node.args, dict(node.kwargs)), lambda ref: f"tensor {ref.id}")
    told = [node.op, kind.__module__, kind.__qualname__, fingerprint.of_object(_settings(operation)),
            fingerprint.of_object(arguments)]  # fmt: skip
    if not kind.__module__.startswith("keras."):
        told.append(fingerprint.of_object(kind.call))
    if node.layer is not None:
        hidden = {key: v for key, v in variables_of(node.layer).items() if node.params.get(key, "") not in shown}
        told.append(
            fingerprint.of_arrays((k, np.asarray(keras.ops.convert_to_numpy(value_of(v)))) for k, v in hidden.items())
        )
    return told


def _settings(operation: keras.Operation) -> object:
    """As the operation tells them; of a class that doesn't, its plain attributes."""
    try:
        return operation.get_config()
    except Exception:  # classes of users, which raise what they like
        plain = (bool, int, float, str, tuple)
        return {k: v for k, v in sorted(vars(operation).items()) if not k.startswith("_") and isinstance(v, plain)}
