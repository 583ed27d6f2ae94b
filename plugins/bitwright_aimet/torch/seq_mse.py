"""`aimet_torch.seq_mse`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bitwright.errors import InputError
from bitwright_aimet import _steps as steps
from bitwright_aimet._settings import refuse
from bitwright_aimet._simulation import SimulationModel

_INPUTS = {"symqt": "quantized", "symfp": "float", "asym": "asymmetric"}


@dataclass
class SeqMseParams:
    """Parameters of AIMET 1.

    Attributes:
        num_batches: of the loader.
        num_candidates: scales tried for each channel.
        inp_symmetry: which inputs weight and candidate see, see the setting `inputs` of `seq_mse`.
        loss_fn: "mse".
        forward_fn: runs the model on a batch.
    """

    num_batches: int
    num_candidates: int = 20
    inp_symmetry: str = "symqt"
    loss_fn: str = "mse"
    forward_fn: Callable[[Any, Any], Any] | None = None


def apply_seq_mse(
    *args: Any,
    sim: SimulationModel | None = None,
    data_loader: Any = None,
    num_candidates: int = 20,
    params: SeqMseParams | None = None,
    forward_fn: Callable[[Any, Any], Any] | None = None,
    modules_to_exclude: Any = None,
    **others: Any,
) -> None:
    """Choose weight scales by the layers' output errors; they stay at later calibrations.

    Called as in AIMET 2, ``(sim, data_loader, num_candidates=20, …)``, or as in 1, ``(model, sim, data_loader,
    params)``.

    Raises:
        InputError: no simulation or no data, a loss other than "mse", or caches that aren't needed here.
    """
    if args and not isinstance(args[0], SimulationModel):
        args = args[1:]  # AIMET 1 takes the float model too, which the simulation holds
    places = [sim, data_loader, params if params is not None else num_candidates]
    for i, value in enumerate(args[:3]):
        places[i] = value
    found, loader, third = places
    if not isinstance(found, SimulationModel) or loader is None:
        raise InputError("apply_seq_mse(sim, data_loader): give a QuantizationSimModel and batches")
    chosen = third if isinstance(third, SeqMseParams) else SeqMseParams(-1, int(third), forward_fn=forward_fn)
    refuse(
        {
            "loss_fn": (chosen.loss_fn, "mse", "errors are squared; QuantSim.apply('weight_clipping') has other norms"),
            **{name: (value, None, "moments are held, and nothing is cached") for name, value in others.items()},
        }
    )
    if chosen.inp_symmetry not in _INPUTS:
        raise InputError(f"inp_symmetry={chosen.inp_symmetry!r}: there are {', '.join(_INPUTS)}")
    count = None if chosen.num_batches < 0 else chosen.num_batches
    data = steps.batches(loader, count, chosen.forward_fn)
    simulation = found
    exclude = tuple(simulation.name_of(m) for m in modules_to_exclude or ())

    def search(quantsim: Any) -> None:
        steps.seq_mse(quantsim, data, chosen.num_candidates, inputs=_INPUTS[chosen.inp_symmetry], exclude=exclude)

    simulation.changed(search)
