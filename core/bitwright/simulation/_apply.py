"""Running one technique on a `QuantSim`: what it may see is gathered, what it returns is taken over."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.backend import Session, require
from bitwright.calibration import activation_encodings, collect, weight_encodings
from bitwright.data import Dataset
from bitwright.errors import InputError
from bitwright.grids import Encoding, EncodingTable, encoding_arrays, encoding_of_arrays
from bitwright.layerwise import LayerwiseWalk
from bitwright.placement import SiteId
from bitwright.plugins import registry
from bitwright.progress import Store
from bitwright.runs import MemoryStore, fingerprint, versions
from bitwright.simulation import _stages as staged
from bitwright.simulation._outcomes import take
from bitwright.simulation._stages import Staged
from bitwright.statistics import Request, Source, Statistic
from bitwright.technique import Context, Technique, require_data

if TYPE_CHECKING:
    from bitwright.simulation._quantsim import QuantSim


def apply(sim: QuantSim, technique: str | Technique, data: Any, settings: Mapping[str, Any]) -> None:
    """`QuantSim.apply`. Nothing changes if it fails."""
    body = registry.technique(technique) if isinstance(technique, str) else technique
    chosen = _settings(body, settings)
    require(sim.backend, body.requires, body.name)
    dataset = None if data is None else sim.open(data)
    if isinstance(body, Staged) and len(stages := body.stages(sim.graph, sim.plan, chosen)) > 1:
        staged.run(sim, body, chosen, stages, dataset)
        return
    requests = list(body.statistics(sim.graph, sim.plan, chosen))
    if dataset is None:
        require_data(body, requests, chosen)
        requests = []
    begin = time.perf_counter()
    # A technique that changes weights must not inherit encodings that an earlier calibration derived from them.
    base = EncodingTable(sim.encodings.frozen, sim.encodings.provenance)
    table = base.merged(weight_encodings(sim.plan, sim.params, base))
    store = open_store(sim, body.name, chosen.model_dump(mode="json"), table, dataset)
    context = Context(
        graph=sim.graph,
        plan=sim.plan,
        params=sim.params,
        encodings=table,
        statistics={} if dataset is None or not requests else _statistics(sim, requests, table, dataset),
        settings=chosen,
        walk=None if dataset is None else _walk(sim, body.name, table, dataset, store),
        store=store,
        progress=sim.progress,
        seed=sim.seed,
        folded=dict(sim.folded),
    )
    outcome = body.apply(context)
    step = getattr(store, "fingerprint", "")
    take(sim, body.name, chosen.model_dump(mode="json"), outcome, step, time.perf_counter() - begin)


def _statistics(
    sim: QuantSim, requests: Sequence[Request], table: EncodingTable, dataset: Dataset
) -> Mapping[str, Statistic]:
    def open_session(source: Source, taps: Any) -> Session:
        if source == "float":
            return sim.backend.session(sim.native, taps)
        full = table.merged(calibrated_activations(sim, table, dataset))
        return sim.backend.simulate(sim.native, sim.plan, full).session(taps)

    return collect(requests, open_session, dataset, progress=sim.progress)


def _walk(sim: QuantSim, name: str, table: EncodingTable, dataset: Dataset, store: Store) -> LayerwiseWalk:
    return LayerwiseWalk(
        sim.backend,
        sim.native,
        sim.graph,
        sim.plan,
        table,
        dataset,
        store,
        sim.progress,
        activations=lambda: table.merged(calibrated_activations(sim, table, dataset)),
        name=name,
    )


def calibrated_activations(sim: QuantSim, table: EncodingTable, dataset: Dataset) -> dict[SiteId, Encoding]:
    """Activation encodings by the plan's schemes over the float network; a stored result of an equal run is taken."""
    store = open_store(
        sim, "calibrate", {"schemes": {s: sim.plan.scheme_of(s) for s in sim.plan.activations}}, table, dataset
    )
    done = _stored_encodings(store, sim.plan.activations)
    if done is None:
        done = activation_encodings(sim.backend, sim.native, sim.plan, sim.params, table, dataset, sim.progress)
        for site, encoding in done.items():
            store.put(f"site/{site}", encoding_arrays(encoding))
        store.put("sites", {"sites": np.array(list(done), dtype=np.str_)})
    return done


def open_store(sim: QuantSim, step: str, settings: Any, table: EncodingTable, dataset: Dataset | None) -> Store:
    """Where a step keeps finished work: keyed by all that its result depends on."""
    if sim.run is None:
        return MemoryStore()
    info = registry.backends().get(sim.backend.name)
    depends = {
        "backend": versions(info.modules if info is not None else ()),
        "graph": fingerprint.of_graph(sim.graph),
        "params": fingerprint.of_params(sim.params),
        "plan": fingerprint.of_json([(s, repr(site.decision)) for s, site in sim.plan.items()]),
        "encodings": fingerprint.of_encodings(table),
        "settings": settings,
        "data": None if dataset is None else dataset.fingerprint(),
        "seed": sim.seed,
    }
    return sim.run.step(step, depends)


def _settings(technique: Technique, values: Mapping[str, Any]) -> Any:
    from pydantic import ValidationError

    try:
        return technique.Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(p) for p in first["loc"]) or "settings"
        known = ", ".join(technique.Settings.model_fields)
        raise InputError(f"{technique.name}: {field}: {first['msg']} (settings: {known})") from None


def _stored_encodings(store: Store, sites: tuple[SiteId, ...]) -> dict[SiteId, Encoding] | None:
    index = store.get("sites")
    if index is None:
        return None
    found: dict[SiteId, Encoding] = {}
    for site in map(str, index["sites"]):
        arrays = store.get(f"site/{site}")
        if site not in sites or arrays is None:
            return None
        found[site] = encoding_of_arrays(arrays)
    return found
