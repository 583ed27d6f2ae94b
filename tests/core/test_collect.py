"""One pass serves all requests: shared taps, budgets, several sources, errors that name the tensor."""

import os
import platform
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from bitwright import registry
from bitwright.calibration import collect
from bitwright.calibration._products import side_by_side
from bitwright.data._dataset import ArrayDataset
from bitwright.errors import InputError
from bitwright.graph import Op, OpKind
from bitwright.simulation import QuantSim
from bitwright.statistics import ChannelMoments, HistogramStatistic, LayerMoments, RangeStatistic, Request
from bitwright.testing import models
from bitwright.testing.reference import ReferenceBackend

FC = Op("fc", OpKind.LINEAR, "MatMul", ("h",), ("y",))


class Network:
    """y = 2x in float, rounded to halves when simulated; counts what is asked of it."""

    def __init__(self, poison=None):
        self.opened, self.runs, self.poison = [], 0, poison

    def open(self, source, taps):
        self.opened.append((source, tuple(taps)))
        return Session(self, source, taps)


class Session:
    def __init__(self, network, source, taps):
        self.network, self.source, self.taps = network, source, taps

    def run(self, batch):
        self.network.runs += 1
        y = 2 * batch["x"]
        if self.source == "simulated":
            y = np.rint(2 * y) / 2
        if self.network.poison == self.network.runs:
            y = y * np.nan
        tensors = {"x": batch["x"], "y": y}
        found = {}
        for tap in self.taps:
            value = tensors[tap.tensor]
            if tap.reduce == "minmax":
                axes = tuple(i for i in range(value.ndim) if tap.axis is None or i != tap.axis)
                value = np.stack([value.min(axis=axes), value.max(axis=axes)])
            found[tap] = value
        return found


class Progress:
    def __init__(self):
        self.log = []

    def start(self, description, total):
        self.log.append((description, total))

    def advance(self, steps=1, note=""):
        self.log.append(steps)

    def finish(self):
        self.log.append("finish")


X = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
DATA = ArrayDataset({"x": X}, 4)


def test_one_pass_serves_everything_and_shares_tensors():
    network, progress = Network(), Progress()
    requests = [
        Request("range", ("y",), RangeStatistic),
        Request("range per channel", ("y",), lambda: RangeStatistic(1)),
        Request("histogram", ("y",), HistogramStatistic),
        Request("same", ("y",), HistogramStatistic),
        Request("quantized mean", ("y",), lambda: ChannelMoments(1), ("simulated",)),
        Request("pair", ("y", "y"), lambda: LayerMoments(FC, 4), ("float", "simulated")),
    ]
    found = collect(requests, network.open, DATA, progress=progress)
    assert list(found) == [r.key for r in requests]
    assert [source for source, _ in network.opened] == ["float", "simulated"]
    assert [(t.tensor, t.reduce, t.axis) for t in network.opened[0][1]] == [
        ("y", "minmax", None),
        ("y", "minmax", 1),
        ("y", "none", None),
    ]
    assert network.runs == 2 * 3
    y, q = 2 * X, np.rint(4 * X) / 2
    assert (float(found["range"].low), float(found["range"].high)) == (y.min(), y.max())
    assert np.array_equal(found["range per channel"].high, y.max(axis=0))
    assert found["histogram"].total == found["same"].total == y.size
    assert found["quantized mean"].mean == pytest.approx(q.mean(axis=0, dtype=np.float64))
    assert found["pair"].xq[0] == pytest.approx(y.T @ q / 10, rel=1e-5)
    assert progress.log == [("Collecting statistics", 10), 4, 4, 2, "finish"]


def test_memory_over_the_budget_takes_several_passes():
    network = Network()
    requests = [Request(str(m), ("y",), HistogramStatistic, memory=m) for m in (60, 50, 30, 200, 40)]
    found = collect(requests, network.open, DATA, budget_bytes=100)
    assert list(found) == ["60", "50", "30", "200", "40"]
    assert len(network.opened) == 3  # 60 + 30, 50 + 40, 200
    assert all(s.total == 40 for s in found.values())
    one = collect(requests, Network().open, DATA)
    for key in found:
        assert np.array_equal(found[key].state()["counts"], one[key].state()["counts"])


def test_repeatable():
    requests = [Request(f"{i}", ("y",), lambda: ChannelMoments(1)) for i in range(8)]
    a, b = (collect(requests, Network().open, DATA) for _ in range(2))
    for key in a:
        assert np.array_equal(a[key].mean, b[key].mean)
        assert np.array_equal(a[key].variance, b[key].variance)


def test_no_requests_run_nothing():
    network = Network()
    assert collect([], network.open, DATA) == {}
    assert network.runs == 0


@pytest.mark.parametrize("make", [RangeStatistic, HistogramStatistic, lambda: ChannelMoments(1)])
def test_nan_names_tensor_network_and_batch(make):
    progress = Progress()
    with pytest.raises(InputError, match=r"tensor 'y' \(float network, batch 1\): NaN or infinite"):
        collect([Request("a", ("y",), make)], Network(poison=2).open, DATA, progress=progress)
    assert progress.log[-1] == "finish"
    with pytest.raises(InputError, match="batch 7"):
        collect([Request("a", ("y",), make)], Network(poison=2).open, DATA, first_batch=6)


def test_empty_data_and_repeated_keys():
    request = Request("a", ("y",), RangeStatistic)
    with pytest.raises(InputError, match="calibration data are empty"):
        collect([request], Network().open, ArrayDataset({"x": X[:0]}, 4))
    with pytest.raises(InputError, match="under the key 'a'"):
        collect([request, request], Network().open, DATA)


def test_a_batch_s_values_are_gone_when_the_next_one_runs():
    """Those of all tensors of a deep network are far more than their statistics."""
    handed: list[weakref.ref[np.ndarray]] = []

    class Watched(Network):
        def open(self, source, taps):
            session = super().open(source, taps)
            run = session.run

            def watched(batch):
                assert all(ref() is None for ref in handed), "values of an earlier batch are still held"
                found = {tap: np.array(v) for tap, v in run(batch).items()}
                handed.extend(map(weakref.ref, found.values()))
                return found

            session.run = watched
            return session

    requests = [
        Request("h", ("y",), HistogramStatistic),
        Request("c", ("x",), ChannelMoments),
        Request("m", ("x", "y"), lambda: LayerMoments(FC, 3), ("float", "float")),
    ]
    found = collect(requests, Watched().open, ArrayDataset({"x": np.ones((8, 3), np.float32)}, 2))
    assert len(handed) == 12 and found["h"].total == 24


def test_memory_goes_back_once_a_calibration_when_its_statistics_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after each pass: the next one would take the same memory anew, page by page."""
    seen: list[int] = []
    held: weakref.WeakSet[HistogramStatistic] = weakref.WeakSet()
    made = HistogramStatistic.__init__

    def noted(self: HistogramStatistic, *args: object, **named: object) -> None:
        held.add(self)
        made(self, *args, **named)

    monkeypatch.setattr(HistogramStatistic, "__init__", noted)
    monkeypatch.setattr("bitwright.backend._parts._trim", lambda _: seen.append(len(held)))
    collect([Request("h", ("y",), HistogramStatistic)], Network().open, DATA)
    assert not seen and not held
    monkeypatch.setattr(registry, "backend_for_model", lambda model: ReferenceBackend())
    model = models.mlp()
    QuantSim(model, scheme="sqnr").calibrate(models.batch(model))
    assert seen == [0]


@pytest.mark.parametrize("asked", [False, True])
def test_who_says_what_the_c_library_keeps_is_left_to_it(asked):
    held = {"MALLOC_TRIM_THRESHOLD_": str(2**32)} if asked else {}
    environment = {k: v for k, v in os.environ.items() if k != "MALLOC_TRIM_THRESHOLD_"} | held
    code = "from bitwright.backend import _parts; print(_parts._trim is None)"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    glibc = platform.libc_ver()[0] == "glibc"
    assert found.stdout.strip() == str(asked or not glibc)


def blas_threads():
    """Of the BLAS in numpy's wheel; an empty set where it has none."""
    return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas" and "numpy" in lib["filepath"]}


def test_products_that_are_computed_side_by_side_have_a_thread_each(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    before, seen = blas_threads(), []

    class Watched(LayerMoments):
        def update(self, *values):
            seen.append(blas_threads())
            super().update(*values)

    data = ArrayDataset({"x": np.ones((4, 2048), np.float32)}, batch_size=2)
    make = lambda count: [Request(f"fc{i}", ("y",), lambda: Watched(FC, 2048, paired=False)) for i in range(count)]
    collect(make(1), Network().open, data)
    assert seen == [before] * 2
    seen.clear()
    collect(make(2), Network().open, data)
    assert seen == [{1} if before else before] * 4
    assert blas_threads() == before
    with pytest.raises(InputError, match="NaN or infinite"):
        collect(make(2), Network(poison=2).open, data)
    assert blas_threads() == before


def test_passes_on_several_threads_leave_the_threads_of_products_as_they_were():
    before = blas_threads()
    inside, leave = threading.Event(), threading.Event()

    def another():
        with side_by_side(1 << 20):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=another)
    with side_by_side(1 << 20):
        thread.start()
        inside.wait()
        assert blas_threads() == ({1} if before else before)
    assert blas_threads() == before
    leave.set()
    thread.join()
    assert blas_threads() == before
