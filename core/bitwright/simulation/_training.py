"""Quantization-aware training around a framework's own loop: a model goes out, weights and grids come back."""

from __future__ import annotations

from dataclasses import asdict, replace

from bitwright.backend import Capability, ParamReader, Trainable, TrainableSimulation, Training, native_content, require
from bitwright.errors import EncodingError, InputError
from bitwright.grids import Provenance
from bitwright.runs import fingerprint
from bitwright.simulation._state import rebuilt, require_calibrated
from bitwright.state import InTraining, SimState


def started(state: SimState, settings: Training) -> SimState:
    """The state with a model out for training, which begins from its encodings.

    Raises:
        CapabilityError: the backend can't train.
        EncodingError: not calibrated yet.
    """
    backend = state.backend
    require(backend, {Capability.TRAINABLE}, "training")
    assert isinstance(backend, Trainable)
    require_calibrated(state)
    made = backend.simulate_trainable(state.native, state.plan, state.encodings, settings)
    return replace(state, training=InTraining(made, settings, state.native, state.plan, _content(state, made)))


def _content(state: SimState, simulation: TrainableSimulation) -> str:
    """What the model in training has now, weights and grids, as a fingerprint: weights of opaque ops too."""
    native = simulation.float_model()
    graph = state.backend.graph(native)
    weights = fingerprint.of_params(ParamReader(state.backend, native, graph))
    content = native_content(state.backend, native, graph)
    return fingerprint.of_json([weights, content, fingerprint.of_encodings(simulation.get())])


def is_untaken(state: SimState) -> bool:
    """Whether the model in training has other weights or grids than at its start, or when it was last taken."""
    training = state.training
    return training is not None and _content(state, training.simulation) != training.taken


def require_taken(state: SimState, what: str) -> None:
    """Refuse to go on with the weights from before a training that wasn't taken over.

    A model of `QuantSim.trainable` that was never stepped, or was taken since, is not an obstacle.

    Args:
        state: of the simulation.
        what: is to be done, for the message.

    Raises:
        InputError: the model in training has other weights or grids than at its start, or when it was last taken.
    """
    if is_untaken(state):
        raise InputError(
            f"{what} would use the weights from before training: the model of trainable() was trained and not taken "
            "over since. Call take() first, or drop_training() to give up what it has learned"
        )


def taken(state: SimState) -> SimState:
    """The state with the weights and encodings that the model in training has now; the encodings are frozen.

    Raises:
        InputError: there is no model in training.
        EncodingError: the model was edited in the meantime.
    """
    training = state.training
    if training is None:
        raise InputError("there is no model in training: call trainable() first")
    if state.native is not training.native or state.plan != training.plan:
        raise EncodingError(
            "the model has other weights, ops or types since trainable(), which taking over what was trained would "
            "undo: take() before applying techniques; trainable() starts again, drop_training() gives up what was "
            "learned"
        )
    content = _content(state, training.simulation)
    native, found = training.simulation.float_model(), training.simulation.get()
    own = (*state.plan.activations, *state.plan.parameters)
    # Frozen: the weights were trained for these grids.
    table = {s: found[s].with_(frozen=True, kept=False, held_by="training") for s in own if s in found}
    settings = asdict(training.settings)
    encodings = state.encodings.merged(table).recorded(Provenance("training", settings))
    changed_by = state.changed_by if content == training.taken else (*state.changed_by, "training")
    now = rebuilt(state, native=native, encodings=encodings, changed_by=changed_by)
    return replace(now, training=InTraining(training.simulation, training.settings, native, now.plan, content))
