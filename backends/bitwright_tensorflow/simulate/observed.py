"""The float model in a session that reports what is fed to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from bitwright.backend import Batch
from bitwright_tensorflow.graph.graph_function import feed_of, named_arguments
from bitwright_tensorflow.graph.model import TfModel, open_session, tensor_id


class ObservedSession(tf.compat.v1.Session):  # type: ignore[misc]
    """A v1 session, for `session.run(fetches, feed_dict)`; also called with arrays, as functions are."""

    model: TfModel | None = None
    seen: Callable[[Batch], None]

    def run(self, fetches: Any, feed_dict: Any = None, options: Any = None, run_metadata: Any = None) -> Any:
        """As of any session; runs that feed all of the model's inputs are reported."""
        if self.model is not None:
            fed = {_name(key): value for key, value in (feed_dict or {}).items()}
            if all(tensor in fed for tensor in self.model.inputs):
                self.seen({tensor: np.asarray(fed[tensor]) for tensor in self.model.inputs})
        return super().run(fetches, feed_dict, options, run_metadata)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run it on arrays or eager tensors, by position or by name; one array, or a dictionary of several outputs."""
        assert self.model is not None
        model = self.model
        feed = feed_of(named_arguments(arguments, named, model.inputs), model.inputs, model.signature)
        results = self.run(dict(model.signature.outputs), {tensor: np.asarray(value) for tensor, value in feed.items()})
        return next(iter(results.values())) if len(results) == 1 else results


def observed(model: TfModel, seen: Callable[[Batch], None]) -> ObservedSession:
    """The whole graph with its variables, in a session of its own."""
    session: ObservedSession = open_session(model, ObservedSession)
    session.model, session.seen = model, seen
    return session


def _name(key: Any) -> str:
    return tensor_id(str(getattr(key, "name", key)))
