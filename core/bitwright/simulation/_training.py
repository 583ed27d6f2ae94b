"""Quantization-aware training around a framework's own loop: a model goes out, weights and grids come back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitwright.backend import Capability, ParamReader, Trainable, TrainableSimulation, Training, require
from bitwright.errors import EncodingError, InputError
from bitwright.grids import EncodingTable, Provenance
from bitwright.runs import fingerprint

if TYPE_CHECKING:
    from bitwright.simulation._quantsim import QuantSim


def start(sim: QuantSim, training: Training) -> TrainableSimulation:
    """A simulation to be trained, from the encodings in force.

    Raises:
        CapabilityError: the backend can't train.
        EncodingError: not calibrated yet.
    """
    backend = sim.backend
    require(backend, {Capability.TRAINABLE}, "training")
    assert isinstance(backend, Trainable)
    assert sim.simulation is not None  # says what isn't calibrated
    return backend.simulate_trainable(sim.native, sim.plan, sim.encodings, training)


def state(sim: QuantSim, simulation: TrainableSimulation) -> str:
    """What the model in training has now, weights and grids, as a fingerprint."""
    native = simulation.float_model()
    graph = sim.backend.graph(native)
    weights = fingerprint.of_params(ParamReader(sim.backend, native, graph))
    return fingerprint.of_json([weights, fingerprint.of_encodings(simulation.get())])


def require_taken(sim: QuantSim, what: str) -> None:
    """Refuse to go on with the weights from before a training that wasn't taken over.

    A model of `QuantSim.trainable` that was never stepped, or was taken since, is no obstacle.

    Args:
        sim: the simulation.
        what: is to be done, for the message.

    Raises:
        InputError: the model in training has other weights or grids than at its start, or when it was last taken.
    """
    if sim._training is None:
        return
    simulation, _, taken = sim._training
    if state(sim, simulation) != taken:
        raise InputError(
            f"{what} would use the weights from before training: the model of trainable() was trained and not taken "
            "over since. Call take() first, or drop_training() to give up what it has learned"
        )


def learned(sim: QuantSim, simulation: TrainableSimulation, training: Training) -> EncodingTable:
    """The encodings after training, frozen: the weights were trained for these grids.

    Raises:
        EncodingError: there is a site that the plan doesn't know; the model was edited in the meantime.
    """
    found = simulation.get()
    if strange := [s for s in found if s not in sim.plan]:
        raise EncodingError(f"site {strange[0]!r} is gone: take() what was trained before applying other techniques")
    own = (*sim.plan.activations, *sim.plan.parameters)
    table = {s: found[s].with_(frozen=True) for s in own if s in found}
    settings = {"range_learning": training.range_learning, "gradient_scale": training.gradient_scale}
    return sim.encodings.merged(table).recorded(Provenance("training", settings))
