"""Sessions and the networks in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitwright.simulation import QuantSim


def network(session: Any, starting_op_names: Sequence[str], output_op_names: Sequence[str]) -> Any:
    """The part of a session's graph between ops, as bitwright opens it."""
    from bitwright_tensorflow import SessionModel

    return SessionModel(session, outputs=list(_several(output_op_names)), inputs=list(_several(starting_op_names)))


def session_of(simulation: QuantSim) -> Any:
    """A new session with a simulation's float model: the user's whole graph, with what was changed."""
    from bitwright_tensorflow import open_session

    return open_session(simulation.native)


def data_of(dataset: Any) -> Any:
    """Batches of a dataset, which in scripts of sessions is one of graph mode."""
    if not any(base.__module__.partition(".")[0] == "tensorflow" for base in type(dataset).__mro__):
        return dataset
    from bitwright_tensorflow import dataset_batches

    return dataset_batches(dataset)


def _several(names: Sequence[str] | str) -> Sequence[str]:
    return [names] if isinstance(names, str) else names
