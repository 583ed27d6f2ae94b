"""A simulation on disk: the native model, exact encodings and how it was set up."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import check_encodings
from bitwright.bundle import hashes
from bitwright.data import Samples, first_samples, samples_in
from bitwright.errors import BitwrightError, InputError, ModelError
from bitwright.files import DAMAGED, atomic_write, make_directory, put_in_place, read_npz, staging, write_text
from bitwright.graph import OpId
from bitwright.grids import EncodingTable, Provenance, encoding_arrays, encoding_of_arrays
from bitwright.plugins import registry
from bitwright.runs import fingerprint
from bitwright.simulation._state import open_state
from bitwright.state import Rounded, SimState
from bitwright.targets import load_target

STATE, ENCODINGS = "quantsim.json", "encodings.npz"


def save(state: SimState, directory: Path) -> Path:
    """See `QuantSim.save`. The JSON file names what belongs to it; all appear when all are written."""
    make_directory(directory)
    with staging(directory) as folder:
        _write(state, folder)
        # What names the files comes first and goes last, so that a killed process leaves nothing that isn't known.
        written = sorted(folder.iterdir(), key=lambda p: (p.name != STATE, p.name == ENCODINGS))
        put_in_place(written, directory, _older(directory, [p.name for p in written]))
    return directory


def _older(directory: Path, names: list[str]) -> list[Path]:
    """The files of an older saved state, what names them last.

    Raises:
        InputError: something else is in a place that is to be taken.
    """
    taken = [directory / n for n in names if (directory / n).exists() or (directory / n).is_symlink()]
    if not taken:
        return []
    try:
        content = json.loads((directory / STATE).read_text(encoding="utf-8"))
        model, known = str(content["model"]), {str(k): str(v) for k, v in content.get("contents", {}).items()}
    except (*DAMAGED, AttributeError, OSError):
        model, known = "", {}
    for path in taken:
        recorded = {k: v for k, v in known.items() if k.partition("/")[0] == path.name}
        own = recorded == hashes([path], directory) if recorded else path.name.startswith(model) and bool(model)
        if path.is_symlink() or not (own or (model and path.name in (STATE, ENCODINGS))):
            raise InputError(
                f"saving would overwrite {str(path)!r}, which isn't the file of a saved simulation; choose another "
                "folder, or remove it first"
            )
    return sorted(taken, key=lambda p: p.name == STATE)


def _write(state: SimState, directory: Path) -> None:
    suffix = registry.backends()[state.backend.name].suffix
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
        "target": state.target.name,
        "sites": list(state.encodings),
        "held_by": {site: e.held_by for site, e in state.encodings.items() if e.held_by},
        "folded": list(state.folded),
        "reference": None if kept is None else _about(kept),
        "changed_by": list(state.changed_by),
        "provenance": [
            {"technique": p.technique, "settings": dict(p.settings), "fingerprint": p.fingerprint}
            for p in state.encodings.provenance
        ],
        "contents": hashes(sorted(directory.iterdir()), directory),
    }
    if state.rounded is not None and state.rounded.native is state.native:
        content["rounded_from"] = state.rounded.network
    content = json.loads(json.dumps(content))  # as it will be read: tuples are lists, keys are text
    write_text(directory / STATE, json.dumps({**content, "seal": _seal(content)}, indent=1))


@dataclass(frozen=True)
class _Saved:
    """What the two files hold, taken apart before anything is opened."""

    backend: str
    model: str
    graph: str
    options: Mapping[str, Any]
    target: str
    encodings: EncodingTable
    folded: Mapping[OpId, tuple[NDArray[np.float32], NDArray[np.float32]]]
    reference: Samples | None
    contents: Mapping[str, str]
    rounded_from: str
    changed_by: tuple[str, ...]


def load(directory: Path, model: object, options: Mapping[str, Any]) -> SimState:
    """See `QuantSim.load`."""
    path = directory / STATE
    if not path.exists():
        raise InputError(f"{directory} holds no saved simulation ({STATE} is missing)")
    try:
        saved = _read(directory)
        known = set(inspect.signature(open_state).parameters)
        if left := set(saved.options) - known:
            raise ValueError(f"its options know no {min(map(repr, left))}")
    except (*DAMAGED, AttributeError) as error:
        raise _damaged(path, error) from None
    if model is None:
        source: object = directory / saved.model
        if (stored := saved.contents.get(saved.model)) and stored != fingerprint.of_file(directory / saved.model):
            raise InputError(f"{directory / saved.model} was changed after the simulation was saved")
    else:
        source = model
    chosen = {**saved.options, "backend": saved.backend, **options}
    if "target" not in options and isinstance(saved.options.get("target"), Mapping):
        chosen["target"] = replace(load_target(saved.options["target"], runtime_needed=False), name=saved.target)
    try:
        state = open_state(source, **chosen)
    except BitwrightError:
        raise
    except (*DAMAGED, AttributeError) as error:
        if options:
            raise
        raise _damaged(path, error) from error  # options of other types than were saved
    if fingerprint.of_graph(state.graph) != saved.graph:
        raise ModelError("the model given has another graph than the one that was saved")
    check_encodings(state.graph, state.plan, {s: e for s, e in saved.encodings.items() if s in state.plan})
    # Of weights that were given in place of the saved ones nobody knows what they were rounded from.
    own = bool(saved.rounded_from) and model is None and saved.model in saved.contents
    return replace(
        state, encodings=saved.encodings, folded=saved.folded, reference=saved.reference,
        rounded=Rounded(state.native, saved.rounded_from) if own else None, changed_by=saved.changed_by,
    )  # fmt: skip


def _damaged(path: Path, error: Exception) -> InputError:
    reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    return InputError(
        f"{path} is damaged ({reason[:200]}); save the simulation again, or open the model and calibrate it"
    )


def _read(directory: Path) -> _Saved:
    content = json.loads((directory / STATE).read_text(encoding="utf-8"))
    if "seal" in content and content["seal"] != _seal(content):
        raise ValueError("its text was changed after it was written")
    # States saved before there were seals have neither them nor hashes.
    contents = {str(k): str(v) for k, v in content.get("contents", {}).items()}
    if ENCODINGS in contents and contents[ENCODINGS] != fingerprint.of_file(directory / ENCODINGS):
        raise ValueError(f"{ENCODINGS} isn't the file that was saved with it")
    if Path(content["model"]).name != content["model"]:
        raise ValueError("its model is none of the folder's own files")
    arrays = read_npz(directory / ENCODINGS)
    kept, reference = content.get("reference"), None
    if kept is not None:
        inputs = {str(name): np.asarray(arrays[f"reference/{i}"]) for i, name in enumerate(kept["inputs"])}
        reference = Samples(inputs, whole=bool(kept["whole"]))
        if "samples" in kept:
            reference = Samples(first_samples(inputs, int(kept["samples"])), entire=inputs)
    table = {str(site): encoding_of_arrays(_under(arrays, f"{i}/")) for i, site in enumerate(content["sites"])}
    # States saved before these two were noted have neither.
    held_by = {str(site): str(who) for site, who in content.get("held_by", {}).items()}
    table = {site: e.with_(held_by=held_by.get(site, "")) for site, e in table.items()}
    folded = {
        str(op): (np.asarray(arrays[f"folded/{i}/gamma"]), np.asarray(arrays[f"folded/{i}/beta"]))
        for i, op in enumerate(content["folded"])
    }
    provenance = tuple(Provenance(**p) for p in content["provenance"])
    # Of states saved before this was noted, any of their techniques may have.
    changed_by = content.get("changed_by", [p.technique for p in provenance if p.technique != "calibrate"])
    return _Saved(
        str(content["backend"]), str(content["model"]), str(content["graph"]), dict(content["options"]),
        str(content.get("target", "custom")), EncodingTable(table, provenance), folded, reference, contents,
        str(content.get("rounded_from", "")), tuple(map(str, changed_by)),
    )  # fmt: skip


def _seal(content: Mapping[str, Any]) -> str:
    """A digest of all that the text says but itself."""
    return fingerprint.of_json({k: v for k, v in content.items() if k != "seal"})


def _about(kept: Samples) -> dict[str, Any]:
    """What the reference's arrays don't say: of a whole batch, how many of its samples are used."""
    about = {"inputs": list(kept.inputs), "whole": kept.whole}
    return about if kept.entire is None else {**about, "samples": samples_in(kept.inputs)}


def _under(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
