"""Finished stages of a search, by content: each is run once, whatever kills the process in between."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.backend import native_content
from bitwright.errors import BitwrightError, InputError, WriteError
from bitwright.files import Scratch
from bitwright.plugins import registry
from bitwright.progress import Progress
from bitwright.runs import RunDirectory, fingerprint, run_in, versions
from bitwright.simulation import QuantSim
from bitwright.technique import Report
from bitwright.workers import Workers

Record = dict[str, Any]


class Stopwatch:
    """Seconds of work, those of earlier processes included: what was resumed counts what it took then."""

    def __init__(self) -> None:
        self.total = 0.0
        self._mark = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, added to the total."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self.total += seconds
        return seconds

    def resumed(self, seconds: float) -> None:
        """A stage that an earlier process finished in so many seconds."""
        self.total += seconds
        self._mark = time.perf_counter()


@dataclass
class Built:
    """A calibrated network and where it lies.

    Attributes:
        sim: the network.
        content: fingerprint of everything that its outputs depend on.
        seconds: what making it took.
        path: its saved state; None where the backend can't save such a model.
    """

    sim: QuantSim
    content: str
    seconds: float
    path: Path | None


class SearchStore:
    """A run directory's view of a search.

    Args:
        run: where finished stages are kept.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.clock = Stopwatch()
        self.unsaved: str = ""
        """Why networks couldn't be saved, if so: they are then built again after a crash."""

    def once(self, name: str, depends: Mapping[str, Any], work: Callable[[], Record]) -> Record:
        """The record of a stage: from an earlier process, or made now and stored."""
        store = self.run.step(name, depends)
        if (record := _read(store.get("record"))) is not None:
            self.clock.resumed(record["lap"])
            return record
        record = work()
        record["lap"] = self.clock.lap()
        self._finish(name, store, record)
        return record

    def known(self, name: str, depends: Mapping[str, Any]) -> Record | None:
        """The record of a stage that is finished already."""
        return _read(self.run.step(name, depends).get("record"))

    def build(
        self,
        name: str,
        depends: Mapping[str, Any],
        make: Callable[[], QuantSim],
        opened: Mapping[str, Any],
    ) -> Built:
        """A network that is made once, and opened from its saved state by later processes.

        Args:
            name, depends: as `RunDirectory.step` takes them.
            make: makes and calibrates it.
            opened: fields of its state that a saved one doesn't hold: run, progress, source, workers.
        """
        store = self.run.step(name, depends)
        state = store.path / "state"
        if (record := _read(store.get("record"))) is not None and record["saved"]:
            try:
                sim = QuantSim.load(state)
            except BitwrightError:
                shutil.rmtree(state, ignore_errors=True)  # damaged: it is made again
            else:
                self.clock.resumed(record["lap"])
                done = tuple((n, Report(s, f, tuple(c), tuple(map(tuple, r)))) for n, s, f, c, r in record["reports"])
                sim = QuantSim.of(replace(sim.state, reports=done, **opened))
                return Built(sim, record["content"], record["seconds"], state)
        begin = time.perf_counter()
        sim = make()
        seconds = time.perf_counter() - begin
        try:
            sim.save(state)
            saved = True
        except WriteError:
            raise
        except BitwrightError as error:
            self.unsaved, saved = str(error), False
        content = content_of(sim)
        reports = [(n, r.summary, dict(r.figures), r.columns, r.rows) for n, r in sim.reports]
        record = {"content": content, "seconds": seconds, "saved": saved, "reports": reports}
        record["lap"] = self.clock.lap()
        self._finish(name, store, record)
        return Built(sim, content, seconds, state if saved else None)

    def _finish(self, name: str, store: Any, record: Record) -> None:
        text = json.dumps(record, default=_plain)
        store.put("record", {"json": np.array(text, dtype=np.str_)})
        self.run.record("stage", name=name, fingerprint=store.fingerprint, seconds=record["lap"])


def _read(arrays: Mapping[str, Any] | None) -> Record | None:
    if arrays is None:
        return None
    record: Record = json.loads(str(arrays["json"]))
    return record


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def content_of(sim: QuantSim) -> str:
    """Fingerprint of all that a network's outputs and further changes depend on."""
    info = registry.backends().get(sim.backend.name)
    backend: list[object] = [sim.backend.name, versions(info.modules if info is not None else ())]
    if adapter := registry.default_registry().release(sim.backend):
        backend.append(adapter)
    return fingerprint.of_json(
        {
            "backend": backend,
            "graph": fingerprint.of_graph(sim.graph),
            "content": native_content(sim.backend, sim.native, sim.graph),
            "params": fingerprint.of_params(sim.params),
            "plan": [(s, repr(site.decision)) for s, site in sim.plan.items()],
            "encodings": fingerprint.of_encodings(sim.encodings),
            "frozen": sorted(sim.encodings.frozen),
            "folded": fingerprint.of_arrays((op, v) for op, pair in sorted(sim.folded.items()) for v in pair),
            "seed": sim.seed,
        }
    )


@contextmanager
def run_of(run: RunDirectory | str | Path | None, out: str | Path | None) -> Iterator[RunDirectory]:
    """The run directory of a search: the one given, ``out/.run``, or one that lives as long as the search."""
    if isinstance(run, RunDirectory):
        yield run
        return
    if run is None and out is not None:
        with run_in(Path(out)) as opened:
            yield opened
            opened.finish()
        return
    with Scratch() as folder, RunDirectory(run or folder) as opened:
        yield opened
        opened.finish()


def open_sim(
    model: Any,
    sample: Any,
    options: Mapping[str, Any],
    run: RunDirectory,
    progress: Progress | None,
    workers: Workers | None = None,
) -> QuantSim:
    """A `QuantSim` to search from: a copy of the one given, or a new one.

    Args:
        model, sample, options: as `QuantSim` takes them.
        run, progress, workers: what serves the search.

    Raises:
        InputError: a simulation is given together with options that it has already.
    """
    if not isinstance(model, QuantSim):
        found = {k: v for k, v in options.items() if v is not None}
        return QuantSim(model, sample, **found, run=run, progress=progress).attach(executor=workers)
    if given := [k for k, v in options.items() if v is not None]:
        raise InputError(f"{', '.join(given)}: the simulation given has its own; set them where it is made")
    return model.fork().attach(run=run, progress=progress, executor=workers or model.workers)
