"""AIMET's enumerations."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from bitwright_aimet._elsewhere import tell_names

EvalFunction = Callable[[Any, int | None, bool], float]
"""What AIMET's own examples annotate: of a model, how many batches, and whether on a GPU."""


class QuantScheme(Enum):
    """How ranges are found, see `bitwright_aimet._settings`."""

    post_training_tf = "tf"
    min_max = "tf"
    post_training_tf_enhanced = "tf_enhanced"
    post_training_percentile = "percentile"
    training_range_learning_with_tf_init = "range_learning_tf"
    training_range_learning_with_tf_enhanced_init = "range_learning_tf_enhanced"


class QuantizationDataType(Enum):
    """Integer or float types."""

    int = 1
    float = 2


class CallbackFunc:
    """A function of a model and of one more argument, which is given here."""

    def __init__(self, func: Callable[..., Any], func_callback_args: Any = None) -> None:
        self.func, self.args = func, func_callback_args

    def __call__(self, model: Any) -> Any:
        """Call it with a model."""
        return self.func(model, self.args)


__getattr__ = tell_names(__name__)
