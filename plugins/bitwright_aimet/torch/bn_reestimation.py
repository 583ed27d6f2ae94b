"""`aimet_torch.bn_reestimation`."""

from __future__ import annotations

from bitwright_aimet._reestimation import Handle, reestimate_bn_stats

__all__ = ["Handle", "reestimate_bn_stats"]
