"""`aimet_tensorflow.adaround.adaround_weight`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitwright_aimet._simulation import param_encodings
from bitwright_aimet._steps import DataSetAdaroundParameters, adaround_simulation
from bitwright_aimet.tensorflow._sessions import data_of, network, session_of

__all__ = ["Adaround", "AdaroundParameters"]


class AdaroundParameters(DataSetAdaroundParameters):
    """The same as of Keras; `data_set` may be a `tf.data.Dataset` of graph mode."""

    def __init__(self, data_set: Any, num_batches: int, *settings: Any, **named: Any) -> None:
        super().__init__(data_of(data_set), num_batches, *settings, **named)


class Adaround:
    """Rounds weights up or down by their layers' output error."""

    @staticmethod
    def apply_adaround(
        session: Any,
        starting_op_names: Sequence[str],
        output_op_names: Sequence[str],
        params: AdaroundParameters,
        path: str,
        filename_prefix: str,
        default_param_bw: int = 4,
        default_quant_scheme: Any = None,
        default_config_file: Any = None,
        param_bw_override_list: Any = None,
        ignore_quant_ops_list: Any = None,
    ) -> Any:
        """A new session with rounded weights; their encodings are in `<path>/<filename_prefix>.encodings`."""
        given = network(session, starting_op_names, output_op_names)
        simulation, rounded = adaround_simulation(
            given, None, params, default_param_bw, param_bw_override_list, ignore_quant_ops_list, default_quant_scheme,
            default_config_file, lambda op: str(getattr(op, "name", op)),
        )  # fmt: skip
        param_encodings(simulation, rounded, path, filename_prefix)
        return session_of(simulation)
