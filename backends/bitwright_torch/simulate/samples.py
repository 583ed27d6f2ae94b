"""Whether first axes are samples, told by what a network computes where its shapes don't."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import numpy as np

from bitwright.backend import Session, Tap
from bitwright.errors import BitwrightError
from bitwright.files import Array
from bitwright.graph import Graph
from bitwright_torch.graph.model import CapturedModel

_KNOWN: WeakKeyDictionary[CapturedModel, bool] = WeakKeyDictionary()


def turns(model: CapturedModel, graph: Graph, opened: Callable[[Sequence[Tap]], Session]) -> bool:
    """Whether inputs that are turned by one place along their first axes turn all outputs so, and nothing more.

    So it is with samples, each of which is computed for itself, and not with channels of images, which convolutions
    mix. Inputs are random numbers, on which nothing else is alike by chance. False where an input has other types,
    or the network doesn't run on such numbers.

    Args:
        model: asked once.
        graph: its graph.
        opened: makes a session that hands out tensors of the model.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _turns(graph, opened)
    return _KNOWN[model]


def _turns(graph: Graph, opened: Callable[[Sequence[Tap]], Session]) -> bool:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in graph.inputs:
        shape = tuple(n for n in graph.tensors[name].shape or () if n is not None)
        if graph.tensors[name].dtype != "float32" or not shape or shape != graph.tensors[name].shape:
            return False
        shapes[name] = shape
    rng = np.random.default_rng(0)
    batch: dict[str, Array] = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    try:
        session = opened([Tap(t) for t in dict.fromkeys(graph.outputs)])
        plain, turned = (
            {tap: np.array(v) for tap, v in session.run(b).items()}
            for b in (batch, {name: np.roll(values, 1, axis=0) for name, values in batch.items()})
        )
    except BitwrightError:
        return False
    # An output may be the same of all samples (a class), but not all that the network computes.
    moved = any(not np.array_equal(values, turned[tap]) for tap, values in plain.items())
    return moved and all(_turned(values, turned[tap]) for tap, values in plain.items())


def _turned(plain: Array, turned: Array) -> bool:
    if plain.ndim == 0 or plain.shape != turned.shape:
        return False
    return np.allclose(np.roll(plain, 1, axis=0), turned, rtol=1e-4, atol=1e-5 * float(np.abs(plain).max(initial=0)))
