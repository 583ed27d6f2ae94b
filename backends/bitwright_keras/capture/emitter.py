"""What spelling out a layer takes of the normalizer: making calls of the normal form, and layers for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import keras

from bitwright.graph import ParamId


class Emitter(Protocol):
    """See `normalize.Normalizer`, which is one."""

    def emit(
        self, name: str, operation: Any, *args: Any, params: Mapping[str, ParamId] | None = None, **kwargs: Any
    ) -> Any:
        """Make one call of the normal form."""

    def layer(
        self,
        source: keras.layers.Layer,
        name: str,
        part: str = "",
        make: Callable[[str], keras.layers.Layer] | None = None,
        params: Mapping[str, ParamId] | None = None,
        called: tuple[Any, Any] | None = None,
    ) -> tuple[keras.layers.Layer, Mapping[str, ParamId]]:
        """The normal form's layer for (a part of) the user's."""
