"""Backends that take scales apart otherwise, or leave some sites in float."""

from __future__ import annotations

import numpy as np

from bitwright.grids import Blockwise, PerChannel, PerTensor
from kit_mutants.base import BIASES, TARGETS, WEIGHTS, computed, encoded
from kit_mutants.rounding import _codes, integers, plain


def collapsed(site, e):
    if e.scale.ndim != 1:
        return e
    return e.with_(scale=e.scale.max(), zero_point=e.zero_point.ravel()[0], granularity=PerTensor())


def reversed_channels(site, e):
    return e if e.scale.ndim != 1 else e.with_(scale=e.scale[::-1], zero_point=e.zero_point[::-1])


def reversed_blocks(site, e):
    if e.scale.ndim != 2:
        return e
    blocks = None if e.block_scale is None else e.block_scale[:, ::-1]
    return e.with_(scale=e.scale[:, ::-1], zero_point=e.zero_point[:, ::-1], block_scale=blocks)


def whole_channels(site, e):
    if e.scale.ndim != 2:
        return e
    assert isinstance(e.granularity, Blockwise)
    return e.with_(
        scale=e.scale.max(axis=1), zero_point=e.zero_point[:, 0], granularity=PerChannel(e.granularity.axis),
        block_scale=None,
    )  # fmt: skip


def doubled_levels(site, e):
    if e.block_scale is None:
        return e
    channel = e.scale[:, :1] / e.block_scale[:, :1]
    return e.with_(scale=(channel * 2 ** np.ceil(np.log2(e.block_scale))).astype(np.float32))


def no_bias(site, e):
    return e.with_(scale=e.scale * np.float32(1e-9)) if e.bits == 32 else e


encoded("per-channel scales are one", "cnn", collapsed, WEIGHTS)
encoded("per-channel scales are one, whole plan", "cnn", collapsed, TARGETS)
encoded("activations' scales are one", "cnn", lambda s, e: collapsed(s, e) if s.role is None else e,
        "test_a_scale_for_each_channel_of_an_activation")  # fmt: skip
encoded("channels are in reverse", "branches", reversed_channels, WEIGHTS)
encoded("blocks are in reverse", "cnn", reversed_blocks, WEIGHTS)
encoded("blocks are ignored", "cnn", whole_channels, WEIGHTS)
encoded("blocks are ignored, whole plan", "cnn", whole_channels, "test_every_type_is_simulated[int4 blocks × uint16]")
encoded("two-level scales are powers of two", "tokens", doubled_levels, WEIGHTS)
computed("derived biases are ignored", "cnn", plain, BIASES, when=lambda e: e.bits == 32)
encoded("derived biases have one scale", "cnn", lambda s, e: collapsed(s, e) if e.bits == 32 else e, BIASES)
computed("int32 is never clipped", "cnn", lambda e, x: np.rint(x.astype(np.float64) / e.spread(x.shape)[0])
         * e.spread(x.shape)[0], BIASES, when=lambda e: e.bits == 32)  # fmt: skip
computed("weights stay in float", "cnn", plain, WEIGHTS, when=lambda e: integers(e) and e.signed)
computed(
    "weights of transposed convolutions stay in float",
    "transposed",
    lambda e, x: x if x.ndim == 4 and x.shape[2] == 4 else _codes(e, x, np.rint),
    WEIGHTS,
    when=lambda e: integers(e) and e.scale.ndim < 2,
)
