"""From what the user holds, an object or a path, to a backend and a model in that backend's form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.backend import Backend, Batch
from bitwright.errors import InputError
from bitwright.plugins import registry


def open_model(
    model: object, sample: Batch | None = None, name: str | None = None, options: Mapping[str, Any] | None = None
) -> tuple[Backend[Any], Any]:
    """The backend for a model object or path, and the model in that backend's form.

    Args:
        model: an object, or a path.
        sample: one batch, for frameworks that trace a model, and for factories that return a model alone.
        name: of the backend, if several could open the model.
        options: the backend's own for opening a path (`Backend.load`).

    Raises:
        InputError: no such file, or the sample doesn't fit.
        ModelError: the model can't be opened.
        PluginError, MissingExtraError: no backend takes it, or its framework isn't installed.
    """
    if isinstance(model, (str, Path)):
        path = Path(model)
        if name and not registry.model_file(path).exists():
            raise InputError(f"there is no file {registry.model_file(path)}")
        backend = registry.backend(name) if name else registry.backend_for_path(path)
        traced = {} if sample is None else {"sample": sample}
        return backend, backend.load(path, **traced, **(options or {}))
    backend = registry.backend(name) if name else registry.backend_for_model(model)
    return backend, backend.adopt(model, sample)
