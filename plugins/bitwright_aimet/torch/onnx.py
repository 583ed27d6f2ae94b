"""`aimet_torch.onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitwright.errors import InputError
from bitwright_aimet._settings import refuse
from bitwright_aimet._simulation import simulation_of, write_qdq

__all__ = ["export"]


def export(
    model: Any,
    args: Any,
    f: str | Path,
    *,
    export_int32_bias: bool = True,
    prequantize_constants: bool = False,
    force_activation_as: str | None = "unsigned",
    **kwargs: Any,
) -> Path:
    """Write the quantized network as ONNX with QuantizeLinear/DequantizeLinear pairs, compared with the simulation.

    Args:
        model: `sim.model`, or the QuantizationSimModel.
        args: not needed, and so are further options of torch's exporter.
        f: path of the ONNX file.
        export_int32_bias: True: biases have int32 codes, as integer runtimes add them.
        prequantize_constants: not looked at: weights are stored as their codes, whose values are the same.
        force_activation_as: "unsigned", as bitwright writes them.

    Returns:
        `f`.

    Raises:
        InputError: `f` isn't the path of an `.onnx` file, or an option can't be meant here.
    """
    refuse(
        {
            "export_int32_bias": (export_int32_bias, True, "integer runtimes add int32 biases; the file has theirs"),
            "force_activation_as": (
                force_activation_as, "unsigned", "the configuration says of which type activations are"
            ),
        }
    )  # fmt: skip
    if not isinstance(f, str | Path) or Path(f).suffix != ".onnx":
        raise InputError(f"f={f!r}: give the path of an .onnx file")
    return write_qdq(simulation_of(model).settle(), Path(f))
