"""The PyTorch backend: torch.export captures, the captured graph runs with the user's own parameters.

`capture(module, sample, …)` gives the model form that `bitwright.QuantSim` takes as it is, with options that QuantSim
doesn't have: free dimensions, and the names of submodules to capture. `parameter_groups(model, rate)` gives an
optimizer the learned grids of range learning at a rate of their own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright_torch.backend import capture_model as capture
    from bitwright_torch.capture.capturing import CaptureNotice
    from bitwright_torch.graph.model import CapturedModel
    from bitwright_torch.simulate.parameter_groups import parameter_groups

__all__ = ["CaptureNotice", "CapturedModel", "capture", "parameter_groups"]


def __getattr__(name: str) -> Any:
    # The plugin's descriptor lives in this package and must not import torch.
    if name not in __all__:
        raise AttributeError(f"module 'bitwright_torch' has no attribute {name!r}")
    if name == "capture":
        from bitwright_torch.backend import capture_model

        return capture_model
    if name == "parameter_groups":
        from bitwright_torch.simulate.parameter_groups import parameter_groups

        return parameter_groups
    if name == "CapturedModel":
        from bitwright_torch.graph.model import CapturedModel

        return CapturedModel
    from bitwright_torch.capture.capturing import CaptureNotice

    return CaptureNotice


# Loading the folder `capture` binds its name here, which is the function's: it is loaded first and unbound.
import_module("bitwright_torch.capture")
del globals()["capture"]
