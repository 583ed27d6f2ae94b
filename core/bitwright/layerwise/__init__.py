"""The layer-by-layer walk: each linear op sees the input that the already replaced layers before it produce."""

from __future__ import annotations

from bitwright.layerwise._cuts import CutCache
from bitwright.layerwise._solving import dump, load, name_left, solved
from bitwright.layerwise._walk import LayerwiseWalk

__all__ = ["CutCache", "LayerwiseWalk", "dump", "load", "name_left", "solved"]
