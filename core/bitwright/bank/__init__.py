"""The bank: all that calibration and layer-wise techniques need of data, collected once, in files without the data."""

from __future__ import annotations

from bitwright.bank._bank import Bank
from bitwright.bank._collecting import collect
from bitwright.bank._merging import merge
from bitwright.bank._noise import tensor_noise, weight_noise
from bitwright.bank._view import BankView

__all__ = ["Bank", "BankView", "collect", "merge", "tensor_noise", "weight_noise"]
