"""`aimet_torch.model_validator.model_validator`."""

from __future__ import annotations

import logging
from typing import Any

from bitwright.verify import validate

_LOG = logging.getLogger(__name__)


class ModelValidator:
    """Says whether a module can be quantized, and what stays in float."""

    @staticmethod
    def validate_model(model: Any, model_input: Any, layers_to_exclude: Any = None) -> bool:
        """Whether it can be; details are logged, and `bitwright.validate(model, sample)` returns them."""
        found = validate(model, model_input)
        _LOG.log(logging.INFO if found.opened else logging.ERROR, "%s", found)
        return found.opened
