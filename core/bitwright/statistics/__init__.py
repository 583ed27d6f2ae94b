"""Mergeable statistics, one class a file."""

from __future__ import annotations

from bitwright.statistics._base import Request, Source, Statistic, finite
from bitwright.statistics._channel import ChannelMoments
from bitwright.statistics._histogram import HistogramStatistic
from bitwright.statistics._moments import SCARCE, LayerMoments
from bitwright.statistics._range import RangeStatistic

__all__ = [
    "SCARCE",
    "ChannelMoments",
    "HistogramStatistic",
    "LayerMoments",
    "RangeStatistic",
    "Request",
    "Source",
    "Statistic",
    "finite",
]
