"""Sessions of integer runtimes, which third parties bring: whatever one does wrong is put down to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, Bundle, IntegerRuntime, Tap
from bitwright.errors import PluginError
from bitwright.graph import TensorId
from bitwright.hookspecs import RuntimeInfo
from bitwright.plugins import registry


class RuntimeSession:
    """A bundle on a runtime (`bitwright.backend.Session`).

    Args:
        info: the runtime's descriptor.
        runtime: what it has made.
        bundle: holds what the runtime executes.
        outputs: the tensors that are wanted.

    Raises:
        InputError, ModelError: as `IntegerRuntime.compile`.
        PluginError: the runtime is broken.
    """

    def __init__(self, info: RuntimeInfo, runtime: IntegerRuntime, bundle: Bundle, outputs: Sequence[TensorId]) -> None:
        self.info = info
        with registry.default_registry().blaming(info):
            self.session = runtime.compile(bundle, outputs)
        if not callable(getattr(self.session, "run", None)):
            raise self._wrong(f"compile makes a {type(self.session).__name__}, which has no run")

    def run(self, batch: Batch) -> Mapping[Tap, NDArray[Any]]:
        """What the runtime hands out, as arrays by `Tap`.

        Raises:
            PluginError: it is broken, or hands out something else.
        """
        with registry.default_registry().blaming(self.info):
            found: object = self.session.run(batch)
        if not isinstance(found, Mapping):
            raise self._wrong(f"run gives a {type(found).__name__}, not a mapping")
        if strange := next((key for key in found if not isinstance(key, Tap)), None):
            raise self._wrong(f"run gives {strange!r}, where a Tap belongs")
        return {tap: np.asarray(values) for tap, values in found.items()}

    def _wrong(self, what: str) -> PluginError:
        return PluginError(f"runtime {self.info.name!r}: {what}, see bitwright.backend.IntegerRuntime")
