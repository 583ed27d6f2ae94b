"""`aimet_tensorflow.cross_layer_equalization`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitwright.simulation import QuantSim
from bitwright_aimet import _steps as steps
from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet.tensorflow._sessions import network, session_of


def equalize_model(sess: Any, start_op_names: Sequence[str], output_op_names: Sequence[str]) -> Any:
    """A new session: batch norms folded, layers equalized, high biases absorbed; bounded ReLUs keep their bounds."""
    simulation = QuantSim(network(sess, start_op_names, output_op_names), target="per_tensor")
    steps.equalize(simulation)
    return session_of(simulation)


__getattr__ = tell_names(__name__)
