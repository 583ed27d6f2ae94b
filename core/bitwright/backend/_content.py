"""What tells models apart whose graphs and parameters are equal."""

from __future__ import annotations

from typing import TypeVar

from bitwright.backend._protocols import Backend, Fingerprinting
from bitwright.graph import Graph
from bitwright.runs import fingerprint

M = TypeVar("M")


def native_content(backend: Backend[M], model: M, graph: Graph) -> str:
    """Fingerprint of what a model computes beyond its graph's structure and its parameters' values.

    Of a backend that isn't `Fingerprinting` it has the calls of the graph's ops, where they have some.
    """
    own = backend.fingerprint(model) if isinstance(backend, Fingerprinting) else ""
    return fingerprint.of_json([fingerprint.of_calls(graph), own])
