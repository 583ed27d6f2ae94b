"""What bitwright looks for; imports no framework."""

from __future__ import annotations

from bitwright.hookspecs import BackendInfo, hookimpl


@hookimpl
def register_backends() -> list[BackendInfo]:
    """The JAX backend."""
    return [
        BackendInfo(
            "jax",
            "JAX functions with a pytree of parameters, and flax.nnx modules.",
            factory="bitwright_jax.backend:JaxBackend",
            modules=("jax", "flax", "bitwright_jax"),
            suffixes=(".jaxq",),
            extra="jax",
        )
    ]
