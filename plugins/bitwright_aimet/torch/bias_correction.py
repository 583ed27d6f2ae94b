"""`aimet_torch.bias_correction`."""

from __future__ import annotations

from typing import Any

from bitwright_aimet import _steps as steps
from bitwright_aimet._settings import CONFIG_2
from bitwright_aimet.torch import _in_place as in_place

__all__ = ["QuantParams", "correct_bias"]


class QuantParams(steps.QuantParams):
    """Types and scheme; without a configuration those of this package's simulations."""

    default_config = CONFIG_2


def correct_bias(
    model: Any,
    quant_params: QuantParams,
    num_quant_samples: int,
    data_loader: Any,
    num_bias_correct_samples: int,
    conv_bn_dict: Any = None,
    perform_only_empirical_bias_corr: bool = True,
    layers_to_ignore: Any = None,
) -> None:
    """Correct the shift of output means that quantization causes, in the module's biases.

    Args:
        model: the module, changed in place.
        quant_params: types and scheme.
        num_quant_samples, num_bias_correct_samples: one pass serves both; so many samples as the larger of them.
        data_loader: batches, or (batch, labels).
        conv_bn_dict: not needed: what was folded is found in the module.
        perform_only_empirical_bias_corr: False folds batch norms first, and corrects by them where there are no data.
        layers_to_ignore: none.
    """
    first = next(iter(data_loader))
    sample = first[0] if isinstance(first, tuple | list) else first
    data = steps.first_samples(data_loader, max(num_quant_samples, num_bias_correct_samples))
    simulation = steps.corrected(model, sample, quant_params, data, layers_to_ignore, perform_only_empirical_bias_corr)
    in_place.write(model, simulation, sample)
