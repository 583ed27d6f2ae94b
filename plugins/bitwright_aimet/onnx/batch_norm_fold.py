"""`aimet_onnx.batch_norm_fold`."""

from __future__ import annotations

from typing import Any

from bitwright_aimet import _steps as steps
from bitwright_aimet.onnx._models import opened, write


def fold_all_batch_norms_to_weight(model: Any) -> list[tuple[str, str]]:
    """Fold batch norms into the layers beside them, in the `ModelProto` itself.

    Returns:
        (layer, batch norm) of each, by name.
    """
    simulation = opened(model)
    folded = steps.fold(simulation)
    write(model, simulation)
    return folded


fold_all_batch_norms = fold_all_batch_norms_to_weight
