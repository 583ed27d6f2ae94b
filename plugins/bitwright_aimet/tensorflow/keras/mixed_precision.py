"""`aimet_tensorflow.keras.mixed_precision`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bitwright_aimet import _tools as tools
from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet._simulation import SimulationModel


def choose_mixed_precision(
    sim: SimulationModel,
    candidates: Sequence[tuple[tools.Width, tools.Width]],
    eval_callback_for_phase1: Callable[[Any], Any] | None,
    eval_callback_for_phase2: Callable[[Any], Any],
    allowed_accuracy_drop: float | None,
    results_dir: str,
    clean_start: bool = False,
    forward_pass_callback: Callable[[Any], Any] | None = None,
    **search: Any,
) -> list[tuple[float, float, Mapping[str, str]]]:
    """Give each group of layers the candidate that it needs; the simulation has the result.

    Arguments and result are those of `bitwright_aimet.torch.mixed_precision.choose_mixed_precision`.
    """
    return tools.mixed_precision(
        sim, candidates, tools.required(forward_pass_callback), eval_callback_for_phase2, allowed_accuracy_drop,
        results_dir,
    )  # fmt: skip


__getattr__ = tell_names(__name__)
