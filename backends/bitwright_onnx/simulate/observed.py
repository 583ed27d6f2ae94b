"""The float model as an ONNX Runtime session that reports what is fed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from bitwright.backend import Batch
from bitwright.files import Array
from bitwright_onnx.simulate.session import compile_session


class ObservedSession:
    """An `onnxruntime.InferenceSession` in all that isn't `run`; also called with batches, as simulated models are.

    Args:
        model: the float model.
        seen: is called with the inputs of each run.
    """

    def __init__(self, model: ir.Model, seen: Callable[[Batch], None]) -> None:
        self._session = compile_session(model)
        self._names = tuple(i.name for i in self._session.get_inputs())
        self._seen = seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None) -> Any:
        """As of an ONNX Runtime session: the outputs asked for, or all, in a list."""
        found = self._session.run(output_names, input_feed, run_options)
        self._seen({name: input_feed[name] for name in self._names})
        return found

    def __call__(self, batch: Batch) -> dict[str, Array]:
        """Outputs by name for one batch of inputs."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self.run(names, dict(batch)), strict=True))
