"""Tasks on workers that die: each costs itself, none is blamed for another, and what kills its worker is named."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from test_layerwise import walk_of
from worker_tasks import fail, guilty, shifted, slow, square

from bitwright.errors import InputError, WorkerError
from bitwright.layerwise import LayerwiseWalk
from bitwright.technique import Layer, LayerResult
from bitwright.testing import models
from bitwright.testing.harness import MemoryStore
from bitwright.workers import open_workers, sendable
from bitwright.workers._workers import TRIES, Place, Workers


def runs(folder: Path) -> list[int]:
    return [p.stat().st_size for p in sorted(folder.iterdir(), key=lambda p: int(p.name))]


@pytest.fixture(scope="module")
def two():
    with open_workers(2) as workers:
        yield workers


def pool_of_two() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


def test_a_killed_process_costs_its_own_task(two, tmp_path):
    calls = [(tmp_path, n, n == 2) for n in range(6)]
    assert list(two.map(square, calls, map(str, range(6)))) == [0, 1, 4, 9, 16, 25]
    assert runs(tmp_path) == [1, 1, 2, 1, 1, 1]


def test_a_pool_that_breaks_as_a_whole_is_made_again_and_only_the_guilty_is_named(tmp_path):
    """Every task that runs in a pool is lost with one worker; those beside the one that kills aren't blamed."""
    done = {}
    with open_workers(pool_of_two) as workers, workers.flight() as flight:
        for n in range(5):
            flight.submit(f"task {n}", square, tmp_path, n, 99 if n == 1 else 0)
        while len(flight):
            name, future = flight.next()
            done[name] = future
    with pytest.raises(WorkerError, match=r"^task 1: its worker died"):
        done.pop("task 1").result()
    assert {k: f.result() for k, f in done.items()} == {f"task {n}": n * n for n in (0, 2, 3, 4)}
    # Once beside others, and then by itself.
    assert (tmp_path / "1").stat().st_size in (TRIES, TRIES + 1)


def test_a_pool_that_was_given_can_not_be_made_again(tmp_path):
    with (
        pool_of_two() as pool,
        open_workers(pool) as workers,
        pytest.raises(WorkerError, match="a function that makes"),
    ):
        list(workers.map(square, [(tmp_path, 1, 1)], ["one"]))


def test_errors_of_a_task_are_its_own():
    with open_workers(ThreadPoolExecutor(2)) as workers, pytest.raises(InputError, match="7 can't be used"):
        list(workers.map(fail, [(7,)], ["seven"]))


@pytest.mark.parametrize("given", [0, True, "local:0", "here", 1.5])
def test_what_is_no_executor_is_refused(given):
    with pytest.raises(InputError):
        open_workers(given)


def test_all_places_are_closed_though_one_cannot_be():
    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait, cancel_futures=cancel_futures)
            shut.append(self)
            raise OSError("it can't be reached")

    shut: list[object] = []
    pools = [Pool(1), Pool(1)]
    with pytest.raises(OSError, match="can't be reached"):
        Workers([Place(1, executor=pool) for pool in pools], lambda: shut.append("cluster")).close()
    assert set(shut) == {*pools, "cluster"}


def test_one_process_is_this_one():
    assert open_workers(None) is None
    assert open_workers(1) is None


# -- the walk


def walked(workers=None, solve=shifted, *, quantized=True, store=None) -> dict[str, LayerResult]:
    walk, graph, *_ = walk_of(models.tokens(), store=store)
    walk = LayerwiseWalk(**{k: getattr(walk, k) for k in walk.__dataclass_fields__ if k not in ("current", "workers")},
                         workers=workers)  # fmt: skip
    return dict(walk([op.id for op in graph.linear_ops], solve, quantized_inputs=quantized))


def same(a: dict[str, LayerResult], b: dict[str, LayerResult]) -> bool:
    return list(a) == list(b) and all(
        np.array_equal(x.weight, y.weight) and np.array_equal(x.bias, y.bias) and x.left == y.left
        for x, y in zip(a.values(), b.values(), strict=True)
    )


@pytest.mark.parametrize("quantized", [True, False])
def test_layers_on_processes_are_those_of_one_after_another(two, quantized, tmp_path):
    """Where x̂ comes from layers that are still being solved the walk waits for them; a killed one changes nothing."""
    found = walked(two, partial(shifted, folder=tmp_path, killed="k"), quantized=quantized)
    assert same(found, walked(quantized=quantized))
    counts = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert counts.pop("k") == 2
    assert set(counts.values()) == {1}


def test_layers_may_be_done_in_any_order():
    with open_workers(ThreadPoolExecutor(3)) as workers:
        assert same(walked(workers, slow, quantized=False), walked(quantized=False))


def test_a_run_that_a_layer_ends_goes_on_from_what_is_finished(two, tmp_path):
    store = MemoryStore()
    with pytest.raises(WorkerError, match=r"^gate_fc: "):
        walked(two, partial(guilty, folder=tmp_path), store=store)
    kept = {k for k in store.entries if k.startswith("layer/")}
    assert kept
    (tmp_path / "again").mkdir()
    found = walked(store=store, solve=partial(shifted, folder=tmp_path / "again"))
    assert same(found, walked())
    assert not {f"layer/{p.name}" for p in (tmp_path / "again").iterdir()} & kept


def test_a_closure_is_called_here(two):
    here = os.getpid()
    seen = []

    def solve(layer: Layer) -> LayerResult:
        seen.append(os.getpid())
        return shifted(layer)

    assert not sendable(solve)
    assert same(walked(two, solve), walked())
    assert set(seen) == {here}


# -- Dask


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("distributed")
    with open_workers("local:2") as workers:
        yield workers


def test_a_killed_dask_worker_costs_its_own_task(cluster, tmp_path):
    calls = [(tmp_path, n, n == 2) for n in range(6)]
    assert list(cluster.map(square, calls, map(str, range(6)))) == [0, 1, 4, 9, 16, 25]
    assert (tmp_path / "2").stat().st_size == 2


def test_layers_on_dask_are_those_of_one_after_another(cluster, tmp_path):
    found = walked(cluster, partial(shifted, folder=tmp_path, killed="k"))
    assert same(found, walked())
    assert (tmp_path / "k").stat().st_size == 2


def test_a_task_that_kills_its_dask_workers_is_named(cluster, tmp_path):
    with cluster.flight() as flight:
        flight.submit("the last one", square, tmp_path, 1, 99)
        name, future = flight.next()
    assert name == "the last one"
    with pytest.raises(WorkerError, match=r"^the last one: its worker died"):
        future.result()


def test_an_address_without_a_scheduler_is_refused(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("bitwright.workers._opening.CONNECT_SECONDS", 0.3)
    with pytest.raises(InputError, match="no Dask scheduler"):
        open_workers("tcp://127.0.0.1:9")
