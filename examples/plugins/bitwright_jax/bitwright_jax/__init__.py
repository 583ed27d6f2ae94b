"""bitwright for JAX: functions with a pytree of parameters, and `flax.nnx` modules."""

from __future__ import annotations

from typing import Any

__all__ = ["JaxFunction"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bitwright_jax import backend

    return getattr(backend, name)
