"""The layer-by-layer walk: each linear op sees the input that the already replaced layers before it produce."""

from __future__ import annotations

from bitwright.layerwise._side_by_side import Solving
from bitwright.layerwise._solving import (
    blocks_within,
    dump,
    layer_of,
    left_at_nearest,
    load,
    name_blocks,
    name_left,
    solution,
)
from bitwright.layerwise._walk import LayerwiseWalk

__all__ = [
    "LayerwiseWalk",
    "Solving",
    "blocks_within",
    "dump",
    "layer_of",
    "left_at_nearest",
    "load",
    "name_blocks",
    "name_left",
    "solution",
]
