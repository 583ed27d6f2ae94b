"""A simulation on disk: the native model, exact encodings and how it was set up."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.data import Samples, first_samples, samples_in
from bitwright.errors import InputError, ModelError
from bitwright.files import DAMAGED, atomic_write, make_directory, write_text
from bitwright.grids import EncodingTable, Provenance, encoding_arrays, encoding_of_arrays
from bitwright.plugins import registry
from bitwright.runs import fingerprint
from bitwright.simulation._state import open_state
from bitwright.state import SimState

STATE, ENCODINGS = "quantsim.json", "encodings.npz"


def save(state: SimState, directory: Path) -> Path:
    """See `QuantSim.save`. The JSON file is written last and names what belongs to it."""
    make_directory(directory)
    suffix = registry.backends()[state.backend.name].suffixes[0]
    model = state.backend.save(state.native, directory / f"model{suffix}")
    arrays = {
        f"{index}/{name}": values
        for index, encoding in enumerate(state.encodings.values())
        for name, values in encoding_arrays(encoding).items()
    }
    arrays |= {
        f"folded/{index}/{name}": values
        for index, pair in enumerate(state.folded.values())
        for name, values in zip(("gamma", "beta"), pair, strict=True)
    }
    kept = state.reference
    if kept is not None:
        inputs = kept.inputs if kept.entire is None else kept.entire
        arrays |= {f"reference/{index}": values for index, values in enumerate(inputs.values())}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    with atomic_write(directory / ENCODINGS) as file:
        file.write(buffer.getvalue())
    content = {
        "backend": state.backend.name,
        "model": model.name,
        "graph": fingerprint.of_graph(state.graph),
        "options": state.options,
        "sites": list(state.encodings),
        "folded": list(state.folded),
        "reference": None if kept is None else _about(kept),
        "provenance": [
            {"technique": p.technique, "settings": dict(p.settings), "fingerprint": p.fingerprint}
            for p in state.encodings.provenance
        ],
    }
    write_text(directory / STATE, json.dumps(content, indent=1))
    return directory


def load(directory: Path, model: object, options: Mapping[str, Any]) -> SimState:
    """See `QuantSim.load`."""
    path = directory / STATE
    if not path.exists():
        raise InputError(f"{directory} holds no saved simulation ({STATE} is missing)")
    try:
        content = json.loads(path.read_text())
        chosen = {**content["options"], "backend": content["backend"], **options}
        source = directory / content["model"] if model is None else model
        with np.load(directory / ENCODINGS, allow_pickle=False) as archive:
            arrays = dict(archive)
    except DAMAGED as error:
        raise InputError(f"{path} is damaged: {error}") from None
    state = open_state(source, **chosen)
    if fingerprint.of_graph(state.graph) != content["graph"]:
        raise ModelError("the model given has another graph than the one that was saved")
    reference = None
    if (kept := content.get("reference")) is not None:
        inputs = {name: arrays[f"reference/{i}"] for i, name in enumerate(kept["inputs"])}
        reference = Samples(inputs, whole=bool(kept["whole"]))
        if "samples" in kept:
            reference = Samples(first_samples(inputs, int(kept["samples"])), entire=inputs)
    return replace(
        state,
        encodings=EncodingTable(
            {site: encoding_of_arrays(_under(arrays, f"{i}/")) for i, site in enumerate(content["sites"])},
            tuple(Provenance(**p) for p in content["provenance"]),
        ),
        folded={
            op: (arrays[f"folded/{i}/gamma"], arrays[f"folded/{i}/beta"]) for i, op in enumerate(content["folded"])
        },
        reference=reference,
    )


def _about(kept: Samples) -> dict[str, Any]:
    """What the reference's arrays don't say: of a whole batch, how many of its samples are used."""
    about = {"inputs": list(kept.inputs), "whole": kept.whole}
    return about if kept.entire is None else {**about, "samples": samples_in(kept.inputs)}


def _under(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
