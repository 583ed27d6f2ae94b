"""`aimet_torch.quantsim`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitwright.backend import Bundle
from bitwright.errors import InputError
from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet._settings import CONFIG_2, read_settings, refuse
from bitwright_aimet._simulation import SimulationModel
from bitwright_aimet.common.defs import QuantizationDataType, QuantScheme
from bitwright_aimet.torch._in_place import name_in
from bitwright_aimet.torch._modules import names_of
from bitwright_aimet.torch.bias_correction import QuantParams

__all__ = [
    "QuantParams",
    "QuantScheme",
    "QuantizationDataType",
    "QuantizationSimModel",
    "load_encodings_to_sim",
    "set_blockwise_quantization_for_weights",
    "set_grouped_blockwise_quantization_for_weights",
]


class QuantizationSimModel(SimulationModel):
    """Simulates a module quantized; it is captured, so reused layers and functional ops need no preparation.

    Args:
        model: the module; it isn't changed.
        dummy_input: one batch; its size stays free.
        quant_scheme: AIMET's enumeration or text; default min-max, as of AIMET 2 (1.x: "tf_enhanced").
        rounding_mode: "nearest".
        default_output_bw, default_param_bw: widths of activations and parameters.
        in_place: False: `model` of the simulation is a copy.
        config_file: a path, or a target's name (`bitwright targets`); None is "default", as in AIMET 2 (1.x:
            "per_tensor").
        default_data_type: integers or floats.
    """

    encoding_version = "1.0.0"

    def __init__(
        self,
        model: Any,
        dummy_input: Any,
        quant_scheme: Any = None,
        rounding_mode: str = "nearest",
        default_output_bw: int = 8,
        default_param_bw: int = 8,
        in_place: bool = False,
        config_file: Any = None,
        default_data_type: Any = QuantizationDataType.int,
    ) -> None:
        refuse({"in_place": (in_place, False, "your model stays as it is; evaluate and train sim.model")})
        settings = read_settings(
            quant_scheme, default_output_bw, default_param_bw, config_file, default_data_type, rounding_mode,
            default_config=CONFIG_2,
        )  # fmt: skip
        self._user = model
        super().__init__(model, dummy_input, settings)

    def name_of(self, layer: Any) -> str:
        """The name of a module, or of what is a name already."""
        return name_in(self._user, layer)

    @property
    def modules(self) -> list[tuple[str, Any]]:
        """The user's modules and their names, without the whole."""
        return [(name, module) for name, module in self._user.named_modules() if name]

    @property
    def onnx(self) -> OnnxExport:
        """AIMET 2's export: ``sim.onnx.export(args, "net.onnx")``."""
        return OnnxExport(self)


class OnnxExport:
    """What `QuantizationSimModel.onnx` is."""

    def __init__(self, simulation: SimulationModel) -> None:
        self._simulation = simulation

    def export(
        self,
        args: Any,
        f: str | Path,
        *,
        encoding_version: str | None = None,
        export_int32_bias: bool | None = None,
        force_activation_as: str | None = "unsigned",
        **kwargs: Any,
    ) -> Bundle:
        """Write the float model to `f`, its encodings beside it, and what `QuantSim.export` writes.

        Args:
            args: not needed, and so are further options of torch's exporter.
            f: path of the ONNX file.
            encoding_version: schema of the encodings file; default 1.0.0.
            export_int32_bias: encodings of biases too; default: in schemas from 2.0.0 on.
            force_activation_as: "unsigned", as bitwright writes them.

        Raises:
            InputError: `f` isn't the path of an `.onnx` file, or an option can't be meant here.
        """
        refuse(
            {
                "force_activation_as": (
                    force_activation_as, "unsigned", "the configuration says of which type activations are"
                )
            }
        )  # fmt: skip
        if not isinstance(f, str | Path) or Path(f).suffix != ".onnx":
            raise InputError(f"f={f!r}: give the path of an .onnx file; its encodings are written beside it")
        path = Path(f)
        return self._simulation.settle().export(
            path.parent,
            name=path.stem,
            encodings_version=encoding_version or self._simulation.encoding_version,
            include_bias=export_int32_bias,
        )


def set_blockwise_quantization_for_weights(
    sim: QuantizationSimModel, arg: Any, bitwidth: int, symmetric: bool, block_size: int
) -> None:
    """Give weights a scale for each block of inputs; `compute_encodings` follows.

    Args:
        sim: the simulation.
        arg: modules of the user's model, their types, or a function of a module.
        bitwidth: of the weights.
        symmetric: True; asymmetric grids come by the target, such as "w4a16_asymmetric".
        block_size: inputs a block; −1 for all of an output's.

    Raises:
        InputError: no such module, or blocks along other axes.
    """
    _set_blocks(sim, arg, symmetric, block_size, f"int{bitwidth}" if block_size == -1 else f"int{bitwidth}:block")


def set_grouped_blockwise_quantization_for_weights(
    sim: QuantizationSimModel,
    arg: Any,
    bitwidth: int,
    symmetric: bool,
    decompressed_bw: int,
    block_size: int,
    block_grouping: int = -1,
) -> None:
    """Give weights two-level scales (LPBQ): small integers a block times one scale for each output.

    Args:
        sim, arg, bitwidth, symmetric: as above.
        decompressed_bw: twice `bitwidth`.
        block_size: inputs a block.
        block_grouping: −1: the blocks of an output share its scale.

    Raises:
        InputError: no such module, or an argument that can't be meant here.
    """
    refuse(
        {
            "decompressed_bw": (decompressed_bw, 2 * bitwidth, f"int{bitwidth} weights unfold to {2 * bitwidth} bits"),
            "block_grouping": (block_grouping, -1, "all blocks of an output share its scale"),
        }
    )
    _set_blocks(sim, arg, symmetric, block_size, f"int{bitwidth}:lpbq")


def _set_blocks(sim: QuantizationSimModel, arg: Any, symmetric: bool, block_size: int, text: str) -> None:
    refuse({"symmetric": (symmetric, True, "QuantSim(target='w4a16_asymmetric') has grids that follow both ends")})
    if not isinstance(block_size, int) or not (block_size > 0 or text.isalnum()):
        raise InputError(f"block_size={block_size!r}: blocks lie along a weight's inputs; give their length")
    type = text if text.isalnum() else f"{text}{block_size}"
    names = names_of(sim, arg)
    sim.changed(lambda quantsim: quantsim.set_precision(names, weights=type))


def load_encodings_to_sim(quant_sim_model: QuantizationSimModel, pytorch_encoding_path: str) -> None:
    """Take all encodings of a file."""
    quant_sim_model.load_encodings(pytorch_encoding_path)


__getattr__ = tell_names(__name__)
