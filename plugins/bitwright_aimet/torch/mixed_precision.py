"""`aimet_torch.mixed_precision`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitwright.errors import InputError
from bitwright.files import make_directory, write_text
from bitwright_aimet import _tools as tools
from bitwright_aimet._simulation import SimulationModel
from bitwright_aimet.torch._modules import names_of
from bitwright_aimet.torch.quantsim import QuantizationSimModel


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


class MixedPrecisionConfigurator:
    """Types of single modules, of model inputs and of outputs, asked for one by one and set by `apply`.

    Args:
        sim: the simulation; `compute_encodings` follows `apply`.
    """

    def __init__(self, sim: QuantizationSimModel) -> None:
        self._sim = sim
        self._asked: list[tuple[list[str], dict[str, str | int]]] = []

    def set_precision(
        self, arg: Any, activation: str | Sequence[str] | None = None, param: Mapping[str, str] | None = None
    ) -> None:
        """Ask for types; the last call on a module wins.

        Args:
            arg: a module of the user's model, with all in it, its name, or a type of modules.
            activation: of what the module reads: "int4", "int8", "int16" or "fp16"; one for all inputs.
            param: "weight" → type.

        Raises:
            InputError: no such module or type, or types of single inputs or biases.
        """
        types: dict[str, str | int] = {}
        if activation is not None:
            types["inputs"] = _type(activation)
        for name, text in (param or {}).items():
            if name != "weight":
                raise InputError(f"param {name!r}: biases follow inputs and weights; give the type of 'weight'")
            types["weights"] = _type(text)
        self._asked.append((names_of(self._sim, arg), types))

    def set_model_input_precision(self, activation: str | Sequence[str]) -> None:
        """Ask for the type of the model's inputs."""
        self._asked.append((list(self._sim.bitwright.graph.inputs), {"activations": _type(activation)}))

    def set_model_output_precision(self, activation: str | Sequence[str]) -> None:
        """Ask for the type of the model's outputs."""
        self._asked.append((list(self._sim.bitwright.graph.outputs), {"activations": _type(activation)}))

    def apply(self, log_file: str | None = "./mmp_log.txt", strict: bool = True) -> None:
        """Set what was asked for.

        Args:
            log_file: what stood against each call, and what changed with it; None writes nothing.
            strict: a type that can't be set is an error, and nothing changes; otherwise it is told in the log.

        Raises:
            InputError: `strict`, and a type can't be set.
        """
        lines: list[str] = []

        def carry_out(quantsim: Any) -> None:
            twin = quantsim.fork()  # so that nothing changes if a later call is refused
            for names, types in self._asked:
                lines.extend(f"{', '.join(names)}: {c}" for c in twin.set_precision(names, strict=strict, **types))
            for names, types in self._asked:
                quantsim.set_precision(names, strict=strict, **types)

        self._sim.changed(carry_out)
        if log_file is not None:
            path = Path(log_file)
            make_directory(path.parent)
            write_text(path, "".join(f"{line}\n" for line in lines) or "everything was set as asked\n")


def _type(asked: str | Sequence[str]) -> str | int:
    """A type as `QuantSim.set_precision` takes it: of integers the width, whose signs are the target's."""
    found = {asked} if isinstance(asked, str) else set(asked)
    if len(found) != 1:
        raise InputError(
            f"activation={asked!r}: one type for all inputs; single tensors: sim.bitwright[site].set(type)"
        )
    (text,) = found
    known: dict[str, str | int] = {"int4": 4, "int8": 8, "int16": 16, "fp16": "float16"}
    if text not in known:
        raise InputError(f"type {text!r}: there are {', '.join(known)}; QuantSim.set_precision takes all others")
    return known[text]
