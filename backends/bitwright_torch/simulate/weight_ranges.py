"""Min-max grids of weights on the device, bit-equal to the core's, for encodings that follow weights in training."""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.grids import EPSILON, FLOAT_FORMATS, Blockwise, Encoding, Granularity, Groups
from bitwright_torch.simulate.kernels import NAMESPACE


def min_max_numbers(weight: Tensor, form: Encoding, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Scale (float32, raw: before two-level rounding) and zero point (int32) of the grid that covers a weight.

    `encoding.encoding_from_range` in torch: float64 from the extremes on, so that both agree to the bit.

    Args:
        weight: in its own layout.
        form: an encoding of the wanted kind; its numbers aren't used, but for whether its grid is one-sided.
        granularity: in the weight's layout.
    """
    groups = Groups.of(tuple(weight.shape), granularity)
    cut = groups.cut(NAMESPACE, weight.detach().float())
    if groups.axes:
        low, high = cut.amin(groups.axes), cut.amax(groups.axes)
    else:
        low, high = cut, cut
    if groups.swapped:
        low, high = low.t(), high.t()
    low, high = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
    if form.float_format is not None:
        scale = torch.maximum(-low, high) / FLOAT_FORMATS[form.float_format][2]
        if not form.float_format.startswith("float8"):
            scale = torch.ones_like(scale)
        return scale.clamp(min=EPSILON).float(), torch.zeros_like(scale, dtype=torch.int32)
    grid, half = form.grid, 2 ** (form.bits - 1)
    zero = torch.zeros_like(high)
    if form.symmetric and one_sided(form):
        scale = high / grid.steps
    elif form.symmetric:
        scale = torch.maximum(high / (half - 1), -low / (half - int(form.strict)))
        zero += 0 if form.signed else half
    else:
        scale = (high - low) / grid.steps
    scale = scale.clamp(min=min(EPSILON, 0.01 / grid.steps)).float()
    if not form.symmetric:
        zero = torch.round(-low / scale.double()).add_(grid.qmin).clamp_(grid.qmin, grid.qmax)
    return scale, zero.to(torch.int32)


def one_sided(form: Encoding) -> bool:
    """Whether a symmetric encoding stored unsigned uses 0..2**bits − 1 for data that are never negative."""
    return form.symmetric and not form.signed and not bool((form.zero_point != 0).any())


def two_level(scale: Tensor, form: Encoding) -> Tensor:
    """`encoding.two_level` in torch; scales of any other granularity as they are."""
    layout = form.granularity
    if not isinstance(layout, Blockwise) or layout.decompressed_bits is None:
        return scale
    ratio = 2 ** (layout.decompressed_bits - form.bits)
    gamma = (scale.amax(1, keepdim=True) / ratio).float()
    result: Tensor = torch.round(scale / gamma).clamp_(1, ratio) * gamma
    return result
