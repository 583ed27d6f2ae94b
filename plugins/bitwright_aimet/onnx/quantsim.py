"""`aimet_onnx.quantsim`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from bitwright.errors import InputError
from bitwright.files import Scratch
from bitwright.simulation import QuantSim
from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet._settings import CONFIG_2, read_settings, refuse
from bitwright_aimet._simulation import SimulationModel, write_qdq
from bitwright_aimet.common.defs import QuantizationDataType, QuantScheme
from bitwright_aimet.onnx._models import proto_of

__all__ = ["QuantScheme", "QuantizationDataType", "QuantizationSimModel", "compute_encodings", "load_encodings_to_sim"]


class QuantizationSimModel(SimulationModel):
    """Simulates an ONNX model quantized.

    Args:
        model: a `ModelProto`, what holds one as `model`, or a path; it isn't changed.
        dummy_input: not needed.
        quant_scheme: AIMET's enumeration or text; default min-max, as of AIMET 2 (1.x: "tf_enhanced").
        rounding_mode: "nearest".
        default_param_bw, default_activation_bw: widths, as in AIMET 1.
        param_type, activation_type: types as in AIMET 2, such as "int4"; they win over the widths.
        use_symmetric_encodings: False: the configuration says which activations are symmetric.
        config_file: a path, or a target's name; None is "default", as in AIMET 2 (1.x: "per_tensor").
        default_data_type: integers or floats.
        user_onnx_libs: none: models with custom ops are opened with `load(path, custom_ops=[…])`.
        others: AIMET's options of devices and sessions, which aren't looked at.
    """

    encoding_version = "1.0.0"

    def __init__(
        self,
        model: Any,
        dummy_input: Any = None,
        quant_scheme: Any = None,
        rounding_mode: str = "nearest",
        default_param_bw: int = 8,
        default_activation_bw: int = 8,
        use_symmetric_encodings: bool = False,
        config_file: Any = None,
        default_data_type: Any = QuantizationDataType.int,
        user_onnx_libs: Any = None,
        *,
        param_type: Any = None,
        activation_type: Any = None,
        **others: Any,
    ) -> None:
        refuse(
            {
                "use_symmetric_encodings": (
                    use_symmetric_encodings, False, 'say it in the configuration: "ops": {"is_symmetric": "True"}'
                ),
                "user_onnx_libs": (
                    list(user_onnx_libs or ()), [],
                    "registry.backend('onnx').load(path, custom_ops=[…]) opens the model; give what it returns",
                ),
            }
        )  # fmt: skip
        param_bw, kind = _width(param_type, default_param_bw, default_data_type)
        activation_bw, other = _width(activation_type, default_activation_bw, default_data_type)
        if kind is not other:
            raise InputError("param_type and activation_type: both integers or both floats; QuantSim takes any two")
        settings = read_settings(
            quant_scheme, activation_bw, param_bw, config_file, kind, rounding_mode,
            default_config=CONFIG_2,
        )  # fmt: skip
        self._proto = proto_of(model)
        self._observed: ObservedSession | None = None
        super().__init__(self._proto, None, settings)

    def _opened(self) -> Any:
        return self.bitwright.model

    @property
    def session(self) -> Any:
        """The simulated model as ONNX Runtime's sessions are used: `run(names, feeds)`, `get_inputs`, `get_outputs`.

        Within `compute_encodings` as a context, the float model, whose feeds are what is calibrated on.
        """
        return SimulatedSession(self.model) if self._observed is None else self._observed

    @contextmanager
    def observed(self) -> Iterator[ObservedSession]:
        """Within the context `session` is the float model, which keeps what it is fed."""
        self._observed = ObservedSession(self.settle())
        try:
            yield self._observed
        finally:
            self._observed = None

    def to_onnx_qdq(
        self,
        *,
        export_int32_bias: bool = True,
        prequantize_constants: bool = False,
        force_activation_as: str | None = "unsigned",
    ) -> Any:
        """The quantized network as a `ModelProto` with Q/DQ pairs, compared with the simulation.

        Args:
            export_int32_bias: True: biases have int32 codes, as integer runtimes add them.
            prequantize_constants: not looked at: weights are stored as their codes, whose values are the same.
            force_activation_as: "unsigned", as bitwright writes them.

        Raises:
            InputError: the model was given as a path, or takes more than 2 GB; or an option can't be meant here.
        """
        refuse(
            {
                "force_activation_as": (
                    force_activation_as, "unsigned", "the configuration says of which type activations are"
                )
            }
        )  # fmt: skip
        if not hasattr(self._proto, "ParseFromString"):
            raise InputError("the model was given as a path: sim.export(path, prefix) writes PREFIX.qdq.onnx")
        with Scratch() as folder:
            path = write_qdq(self.settle(), folder / "model.onnx")
            if len(list(folder.iterdir())) > 1:
                raise InputError("the model takes more than 2 GB: sim.export(path, prefix) writes PREFIX.qdq.onnx")
            made = type(self._proto)()
            made.ParseFromString(path.read_bytes())
        return made


@contextmanager
def compute_encodings(sim: QuantizationSimModel) -> Iterator[None]:
    """Calibrate on what `sim.session` is run on within the context: ``with compute_encodings(sim): …``.

    Raises:
        InputError: nothing was run.
    """
    with sim.observed() as observed:
        yield
    if not observed.feeds:
        raise InputError("compute_encodings: nothing was run; call sim.session.run(None, feeds) within the context")
    sim.compute_encodings(observed.feeds)


class ObservedSession:
    """The float model by the calls of an `onnxruntime.InferenceSession`; keeps what it is fed.

    Attributes:
        feeds: a mapping for each run.
    """

    def __init__(self, quantsim: QuantSim) -> None:
        self._quantsim = quantsim
        self.feeds: list[dict[str, Any]] = []

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None) -> Any:
        """The outputs asked for, or all, in a list."""
        feed = {name: np.array(value) for name, value in input_feed.items()}
        names = list(self._quantsim.graph.outputs)
        found = dict(zip(names, self._quantsim.predict([feed], simulated=False), strict=True))
        self.feeds.append(feed)
        return [found[name] for name in (output_names or names)]

    def get_inputs(self) -> list[Any]:
        """What is fed; each has its `name`."""
        return [SimpleNamespace(name=name) for name in self._quantsim.graph.inputs]

    def get_outputs(self) -> list[Any]:
        """What is computed; each has its `name`."""
        return [SimpleNamespace(name=name) for name in self._quantsim.graph.outputs]


class SimulatedSession:
    """A simulated model by the calls of an `onnxruntime.InferenceSession`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None) -> Any:
        """The outputs asked for, or all, in a list."""
        found = self._model.run(input_feed)
        return [found[name] for name in (output_names or self._model.outputs)]

    def get_inputs(self) -> list[Any]:
        """What is fed; each has its `name`."""
        return [SimpleNamespace(name=name) for name in self._model.inputs]

    def get_outputs(self) -> list[Any]:
        """What is computed; each has its `name`."""
        return [SimpleNamespace(name=name) for name in self._model.outputs]


def load_encodings_to_sim(
    quant_sim_model: QuantizationSimModel, onnx_encoding_path: str, strict: bool = True, **options: Any
) -> None:
    """Take the encodings of a file; sites without an entry are left in float, unless told otherwise.

    Args:
        quant_sim_model: the simulation.
        onnx_encoding_path: the file.
        strict: an entry for what isn't quantized is an error.
        options: `allow_overwrite`, `disable_missing_quantizers`.
    """
    quant_sim_model.load_encodings(
        onnx_encoding_path,
        strict=strict,
        partial=not options.get("disable_missing_quantizers", True),
        allow_overwrite=options.get("allow_overwrite", True),
    )


def _width(asked: Any, width: int, data_type: Any) -> tuple[int, Any]:
    if asked is None:
        return width, QuantizationDataType[getattr(data_type, "name", str(data_type))]
    text = str(getattr(asked, "name", asked)).lower()
    for prefix, kind in (("float", QuantizationDataType.float), ("int", QuantizationDataType.int)):
        if text.startswith(prefix) and text.removeprefix(prefix).isdigit():
            return int(text.removeprefix(prefix)), kind
    raise InputError(f"type {asked!r}: int2 to int16, float16 or float32; QuantSim takes blocks and fp8 too")


__getattr__ = tell_names(__name__)
