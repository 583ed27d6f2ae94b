"""Layer-by-layer and block-by-block walks: each sees the input that what was replaced before it produces."""

from __future__ import annotations

from bitwright.layerwise._base import Walk
from bitwright.layerwise._block_walk import BlockwiseWalk
from bitwright.layerwise._side_by_side import Solving
from bitwright.layerwise._solving import (
    blocks_within,
    dump,
    layer_of,
    left_at_nearest,
    load,
    name_blocks,
    name_left,
    name_scarce,
    solution,
)
from bitwright.layerwise._walk import LayerwiseWalk

__all__ = [
    "BlockwiseWalk",
    "LayerwiseWalk",
    "Solving",
    "Walk",
    "blocks_within",
    "dump",
    "layer_of",
    "left_at_nearest",
    "load",
    "name_blocks",
    "name_left",
    "name_scarce",
    "solution",
]
