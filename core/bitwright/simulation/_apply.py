"""Techniques and calibration: what a step may see of a state is gathered, and what it finds makes the next state."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np

from bitwright.backend import Branching, Part, PartialExecution, Session, Simulation, Tap, native_content, require, trim
from bitwright.bank import Bank, BankView
from bitwright.calibration import (
    activation_encodings,
    activation_grids,
    activation_requests,
    collect,
    doubts_of_weights,
    dynamic_encodings,
    guarded,
    in_parts,
    to_calibrate,
    weight_encodings,
)
from bitwright.catalogue import described
from bitwright.data import DataLike, Dataset, ImplausibleDataWarning, Remembering, Watching, doubts_of_calibration
from bitwright.errors import InputError, PluginError
from bitwright.graph import Graph, TensorId
from bitwright.grids import Encoding, EncodingTable, Provenance, encoding_arrays, encoding_of_arrays
from bitwright.layerwise import BlockwiseWalk, LayerwiseWalk, Walk
from bitwright.placement import SiteId
from bitwright.plugins import registry
from bitwright.progress import Store, closing
from bitwright.runs import MemoryStore, fingerprint, versions
from bitwright.simulation import _stages as staged
from bitwright.simulation._outcomes import taken
from bitwright.simulation._stages import Staged
from bitwright.state import SimState
from bitwright.statistics import Request, Source, Statistic
from bitwright.technique import BlockWalk, Context, LayerWalk, Report, Settings, Technique, require_data

W = TypeVar("W", bound=Walk)


def apply(state: SimState, technique: str | Technique, data: DataLike | None, settings: Mapping[str, Any]) -> SimState:
    """The state after one technique, see `QuantSim.apply`."""
    body = registry.technique(technique) if isinstance(technique, str) else technique
    chosen = _settings(body, settings)
    require(state.backend, body.requires, body.name)
    dataset = None if data is None else state.open(data)
    bank = BankView(dataset, state) if isinstance(dataset, Bank) else None
    if len(stages := _stages(body, state, chosen)) > 1:
        return staged.run(
            state, body.name, chosen, stages, lambda now, stage: apply(now, body, dataset, stage.model_dump())
        )
    requests = _requests(body, state, chosen)
    if dataset is None:
        require_data(body, requests, chosen)
        requests = []
    begin = time.perf_counter()
    # A technique that changes weights must not inherit encodings that an earlier calibration derived from them.
    base = EncodingTable(state.encodings.held, state.encodings.provenance)
    table = _without_data(state, base)
    by = registry.default_registry().release(technique)
    store = open_store(state, body.name, chosen.model_dump(mode="json"), table, dataset, by)
    statistics: Mapping[str, Statistic] = {}
    walk: LayerWalk | None = None
    blocks: BlockWalk | None = None
    if bank is not None:
        statistics, walk = bank.statistics(requests, body.name), bank.walk(table, store, body.name)
    elif dataset is not None:
        statistics = _statistics(state, requests, table, dataset) if requests else {}
        walk = replace(_walk(LayerwiseWalk, state, body.name, table, dataset, store), workers=state.workers)
        blocks = _walk(BlockwiseWalk, state, body.name, table, dataset, store)
    with _going_on(body), closing(state.progress) as progress:
        context = Context(
            graph=state.graph,
            plan=state.plan,
            params=state.params,
            encodings=table,
            statistics=statistics,
            settings=chosen,
            walk=walk,
            store=store,
            progress=progress,
            seed=state.seed,
            folded=dict(state.folded),
            blocks=blocks,
            **_branching(state),
        )
        outcome = body.apply(context)
    if bank is not None:
        outcome = bank.noted(outcome)
    step = getattr(store, "fingerprint", "")
    now = taken(state, body.name, chosen.model_dump(mode="json"), outcome, step, time.perf_counter() - begin)
    if walk is not None:
        trim()
    return now if bank is None else bank.followed(now, outcome)


@contextmanager
def _going_on(technique: Technique) -> Iterator[None]:
    """Run a technique's code, which is not to end the process: other exceptions pass, and tell where they arose.

    Raises:
        PluginError: it calls `sys.exit`; the technique is named, and the plugin that it comes from.
    """
    try:
        yield
    except SystemExit as error:
        whose = next((f" of {plugin}" for plugin in registry.default_registry().culprits(error)), "")
        raise PluginError(
            f"technique {technique.name!r}{whose} can't be used: it ends the process by itself ({described(error)})"
        ) from error


def _stages(technique: Technique, state: SimState, settings: Settings) -> Sequence[Settings]:
    """Those that a technique works in, if it says so."""
    if not isinstance(technique, Staged):
        return ()
    with _going_on(technique):
        return technique.stages(state.graph, state.plan, settings)


def _branching(state: SimState) -> dict[str, Any]:
    """What a technique may know of branches, where the backend can put them in."""
    if not isinstance(state.backend, Branching):
        return {}
    return {"branch_obstacle": partial(state.backend.branch_obstacle, state.native)}


def calibrated(state: SimState, data: DataLike | None) -> SimState:
    """The state with the range of every site that isn't frozen or kept, see `QuantSim.calibrate`."""
    if data is None:
        table = _without_data(state, EncodingTable(state.encodings.held, state.encodings.provenance))
        if missing := to_calibrate(state.plan, table):
            raise InputError(f"calibrate: {len(missing)} activations take their range of data, {missing[0]!r} first")
        _doubt_weights(state, table)
        return replace(state, encodings=guarded(state.plan, table, state.params))
    opened = state.open(data)
    if isinstance(opened, Bank):
        return _calibrated_on_bank(state, opened)
    watched = Watching(opened)
    dataset = Remembering(watched, state.inputs)
    params = state.params
    table = _without_data(state, EncodingTable(state.encodings.held, state.encodings.provenance))
    table = table.merged(calibrated_activations(state, table, dataset))
    for doubt in doubts_of_calibration(watched.seen, _unscaled(state.graph)):
        warnings.warn(f"calibrate: {doubt}", ImplausibleDataWarning, stacklevel=3)
    _doubt_weights(state, table)
    return replace(state, encodings=guarded(state.plan, table, params), reference=dataset.taken())


def _doubt_weights(state: SimState, table: EncodingTable) -> None:
    """Warn of weights that the least step of a grid loses, before scales are raised for the sake of biases."""
    for doubt in doubts_of_weights(state.plan, table, state.params):
        warnings.warn(f"calibrate: {doubt}", stacklevel=4)


def _without_data(state: SimState, held: EncodingTable) -> EncodingTable:
    """What is held, and encodings that need no data: of weights, and of activations with a range at run time."""
    weights = weight_encodings(state.plan, state.params, held)
    return held.merged(weights).merged(dynamic_encodings(state.plan, held))


def _unscaled(graph: Graph) -> list[TensorId]:
    """Inputs that only layers with weights read: nothing in the model scales them."""
    return [t for t in graph.inputs if (users := graph.consumers(t)) and all(op.weight is not None for op in users)]


def _calibrated_on_bank(state: SimState, bank: Bank) -> SimState:
    """Ranges by the plan's schemes on a bank's histograms, which are those of the float network."""
    params, view = state.params, BankView(bank, state)
    view.require()
    table = _without_data(state, EncodingTable(state.encodings.held, state.encodings.provenance))
    sites = to_calibrate(state.plan, table)
    requests = activation_requests(state.graph, state.plan, sites)
    table = table.merged(activation_grids(state.plan, sites, view.statistics(requests, "calibration")))
    settings = {"scheme": state.scheme, "bank": bank.fingerprint()}
    told = Report(
        f"ranges of {len(sites)} activations from a bank of {bank.samples} samples: histograms of the float network, "
        "whose weights aren't rounded",
        {"sites": float(len(sites))},
    )
    _doubt_weights(state, table)
    return replace(
        state,
        encodings=guarded(state.plan, table, params).recorded(Provenance("calibrate", settings)),
        reports=(*state.reports, ("calibrate", told)),
    )


def _statistics(
    state: SimState, requests: Sequence[Request], table: EncodingTable, dataset: Dataset
) -> Mapping[str, Statistic]:
    @cache
    def simulation() -> Simulation[Any]:
        full = table.merged(calibrated_activations(state, table, dataset))
        return state.backend.simulate(state.native, state.plan, full)

    def open_session(source: Source, taps: Sequence[Tap]) -> Session:
        return state.backend.session(state.native, taps) if source == "float" else simulation().session(taps)

    def open_part(source: Source, part: Part, feeds: Sequence[TensorId] | None, taps: Sequence[Tap]) -> Session:
        if feeds is None:
            return open_session(source, taps)
        if source != "float":
            return simulation().segment(feeds, taps)
        assert isinstance(state.backend, PartialExecution)
        return state.backend.segment(state.native, feeds, taps)

    divided = in_parts(state.backend, state.graph, open_part)
    found = collect(requests, open_session, dataset, progress=state.progress, divided=divided)
    trim()
    return found


def _walk(kind: type[W], state: SimState, name: str, table: EncodingTable, dataset: Dataset, store: Store) -> W:
    return kind(
        state.backend,
        state.native,
        state.graph,
        state.plan,
        table,
        dataset,
        store,
        state.progress,
        activations=lambda: table.merged(calibrated_activations(state, table, dataset)),
        name=name,
    )


def calibrated_activations(state: SimState, table: EncodingTable, dataset: Dataset) -> dict[SiteId, Encoding]:
    """Activation encodings by the plan's schemes over the float network; a stored result of an equal run is taken."""
    store = open_store(
        state, "calibrate", {"schemes": {s: state.plan.scheme_of(s) for s in state.plan.activations}}, table, dataset
    )
    done = _stored_encodings(store, state.plan.activations)
    if done is None:
        done = activation_encodings(
            state.backend, state.native, state.plan, state.params, table, dataset, state.progress
        )
        for site, encoding in done.items():
            store.put(f"site/{site}", encoding_arrays(encoding))
        store.put("sites", {"sites": np.array(list(done), dtype=np.str_)})
        trim()  # the statistics are gone too
    return done


def open_store(
    state: SimState, step: str, settings: object, table: EncodingTable, dataset: Dataset | None, release: str = ""
) -> Store:
    """Where a step keeps finished work: keyed by all that its result depends on.

    Args:
        state, step, settings, table, dataset: what the step is, and what it works on.
        release: of the third party that it comes from (`Registry.release`): another one may find something else.
    """
    if state.run is None:
        return MemoryStore()
    info = registry.backends().get(state.backend.name)
    depends = {
        "backend": versions(info.modules if info is not None else ()),
        "graph": fingerprint.of_graph(state.graph),
        "content": native_content(state.backend, state.native, state.graph),
        "params": fingerprint.of_params(state.params),
        "plan": fingerprint.of_json([(s, repr(site.decision)) for s, site in state.plan.items()]),
        "encodings": fingerprint.of_encodings(table),
        "settings": settings,
        "data": None if dataset is None else dataset.fingerprint(),
        "seed": state.seed,
    }
    adapter = registry.default_registry().release(state.backend)
    return state.run.step(step, depends | {k: v for k, v in (("release", release), ("adapter", adapter)) if v})


def _requests(technique: Technique, state: SimState, settings: object) -> list[Request]:
    """What a technique asks for.

    Raises:
        PluginError: it gives something else.
    """
    with _going_on(technique):
        given: object = technique.statistics(state.graph, state.plan, settings)
    found: list[Request] = []
    for request in given if isinstance(given, Iterable) else [given]:
        if not isinstance(request, Request):
            raise PluginError(f"technique {technique.name!r}: `statistics` gives {request!r} where Requests belong")
        found.append(request)
    return found


def _settings(technique: Technique, values: Mapping[str, Any]) -> Settings:
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
