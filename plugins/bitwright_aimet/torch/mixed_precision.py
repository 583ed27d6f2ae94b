"""`aimet_torch.mixed_precision`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bitwright_aimet import _tools as tools
from bitwright_aimet._simulation import SimulationModel


def choose_mixed_precision(
    sim: SimulationModel,
    dummy_input: Any,
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

    Args:
        sim: calibrated.
        dummy_input: not needed.
        candidates: pairs of (width, data type): activations, parameters.
        eval_callback_for_phase1: not called: phase 1 measures the noise at the outputs, which is finer.
        eval_callback_for_phase2: a model to its score.
        allowed_accuracy_drop: against the float model.
        results_dir: where the network, the front and a page are written, and finished work.
        clean_start: not needed: finished work counts only where model, data and settings are the same.
        forward_pass_callback: runs a model on calibration data.
        search: AIMET's options of its search algorithms, which aren't looked at.

    Returns:
        Relative bit operations, score, and candidate by group of each assignment that was evaluated.

    Raises:
        InputError: no `forward_pass_callback`.
    """
    return tools.mixed_precision(
        sim, candidates, tools.required(forward_pass_callback), eval_callback_for_phase2, allowed_accuracy_drop,
        results_dir,
    )  # fmt: skip
