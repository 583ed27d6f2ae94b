"""A QuantSim on disk: the native model, exact encodings and how it was set up."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bitwright.bundle import Samples
from bitwright.errors import InputError, ModelError
from bitwright.files import DAMAGED, atomic_write, make_directory, write_text
from bitwright.grids import EncodingTable, Provenance, encoding_arrays, encoding_of_arrays
from bitwright.plugins import registry
from bitwright.runs import fingerprint

if TYPE_CHECKING:
    from bitwright.simulation._quantsim import QuantSim

S = TypeVar("S", bound="QuantSim")
STATE, ENCODINGS = "quantsim.json", "encodings.npz"


def save(sim: QuantSim, directory: Path) -> Path:
    """See `QuantSim.save`. The JSON file is written last and names what belongs to it."""
    make_directory(directory)
    suffix = registry.backends()[sim.backend.name].suffixes[0]
    model = sim.backend.save(sim.native, directory / f"model{suffix}")
    arrays = {
        f"{index}/{name}": values
        for index, encoding in enumerate(sim.encodings.values())
        for name, values in encoding_arrays(encoding).items()
    }
    arrays |= {
        f"folded/{index}/{name}": values
        for index, pair in enumerate(sim.folded.values())
        for name, values in zip(("gamma", "beta"), pair, strict=True)
    }
    kept = sim.reference
    if kept is not None:
        arrays |= {f"reference/{index}": values for index, values in enumerate(kept.inputs.values())}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    with atomic_write(directory / ENCODINGS) as file:
        file.write(buffer.getvalue())
    state = {
        "backend": sim.backend.name,
        "model": model.name,
        "graph": fingerprint.of_graph(sim.graph),
        "options": sim.options,
        "sites": list(sim.encodings),
        "folded": list(sim.folded),
        "reference": None if kept is None else {"inputs": list(kept.inputs), "whole": kept.whole},
        "provenance": [
            {"technique": p.technique, "settings": dict(p.settings), "fingerprint": p.fingerprint}
            for p in sim.encodings.provenance
        ],
    }
    write_text(directory / STATE, json.dumps(state, indent=1))
    return directory


def load(cls: type[S], directory: Path, model: Any, options: dict[str, Any]) -> S:
    """See `QuantSim.load`."""
    path = directory / STATE
    if not path.exists():
        raise InputError(f"{directory} holds no saved simulation ({STATE} is missing)")
    try:
        state = json.loads(path.read_text())
        chosen = {**state["options"], "backend": state["backend"], **options}
        source = directory / state["model"] if model is None else model
        with np.load(directory / ENCODINGS, allow_pickle=False) as archive:
            arrays = dict(archive)
    except DAMAGED as error:
        raise InputError(f"{path} is damaged: {error}") from None
    sim = cls(source, **chosen)
    if fingerprint.of_graph(sim.graph) != state["graph"]:
        raise ModelError("the model given has another graph than the one that was saved")
    sim.encodings = EncodingTable(
        {site: encoding_of_arrays(_under(arrays, f"{i}/")) for i, site in enumerate(state["sites"])},
        tuple(Provenance(**p) for p in state["provenance"]),
    )
    sim.folded = {op: (arrays[f"folded/{i}/gamma"], arrays[f"folded/{i}/beta"]) for i, op in enumerate(state["folded"])}
    if (kept := state.get("reference")) is not None:
        inputs = {name: arrays[f"reference/{i}"] for i, name in enumerate(kept["inputs"])}
        sim.reference = Samples(inputs, whole=bool(kept["whole"]))
    return sim


def _under(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
