"""`aimet_torch.visualize_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitwright.errors import InputError
from bitwright.plugins import registry
from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet._settings import refuse


def visualize_changes_after_optimization(
    old_model: Any, new_model: Any, results_dir: str, selected_layers: Any = None, *, dummy_input: Any = None
) -> Any:
    """Draw the parameters of a module before and after a change, each over the other.

    Args:
        old_model, new_model: modules.
        results_dir: where `visualize_changes_after_optimization.html` is written.
        selected_layers: all: the page lets one choose.
        dummy_input: one batch, which AIMET doesn't take: models are captured on it.

    Returns:
        The `Visualization`.

    Raises:
        InputError: no `dummy_input`.
    """
    refuse({"selected_layers": (selected_layers, None, "the page has all of them, to choose from")})
    if dummy_input is None:
        raise InputError("dummy_input: give one batch, visualize_changes_after_optimization(…, dummy_input=batch)")
    page = Path(results_dir) / "visualize_changes_after_optimization.html"
    return registry.tool("visualize")(old_model, new_model, out=page, sample=dummy_input)


__getattr__ = tell_names(__name__)
