"""Mergeable statistics, one class a file."""

from bitwright.statistics.base import Request, Source, Statistic, Tap
from bitwright.statistics.channel import ChannelMoments
from bitwright.statistics.histogram import HistogramStatistic
from bitwright.statistics.moments import LayerMoments
from bitwright.statistics.range import RangeStatistic

__all__ = [
    "ChannelMoments",
    "HistogramStatistic",
    "LayerMoments",
    "RangeStatistic",
    "Request",
    "Source",
    "Statistic",
    "Tap",
]
