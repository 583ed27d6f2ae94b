"""A forward pass as data: what a function feeds to the model is recorded once, and gone through as data are."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from bitwright import registry
from bitwright.data import _forward as forward
from bitwright.data import is_forward_pass, open_data
from bitwright.errors import InputError
from bitwright.runs import fingerprint
from bitwright.simulation import QuantSim
from bitwright.testing import models
from bitwright.testing.reference import ReferenceBackend

RNG = np.random.default_rng(0)


@pytest.fixture
def sim(monkeypatch):
    monkeypatch.setattr(registry, "backend_for_model", lambda model: ReferenceBackend())
    return QuantSim(models.mlp())


def batches_for(sim):
    ((name, (shape, _)),) = sim.backend.input_specs(sim.native).items()
    return name, [RNG.normal(size=(4, *shape[1:])).astype(np.float32) for _ in range(3)]


def grids(sim):
    return fingerprint.of_encodings(sim.encodings)


def test_what_is_a_forward_pass():
    class Loader:
        def __iter__(self):
            return iter(())

        def __call__(self, model):
            raise AssertionError

    assert is_forward_pass(lambda model: None)
    assert is_forward_pass(lambda model, batches=4: None)
    assert not is_forward_pass(lambda: iter(()))
    assert not is_forward_pass(lambda batches=4: iter(()))
    assert not is_forward_pass(lambda model, args: None)
    assert not is_forward_pass(Loader())
    assert not is_forward_pass([np.zeros(3)])


def test_a_backend_without_a_form_of_its_own_gives_a_function_of_arrays(sim):
    name, batches = batches_for(sim)
    by_data = grids(sim.fork().calibrate(batches))
    for run in (
        lambda model: [model(x) for x in batches],
        lambda model: [model(**{name: x}) for x in batches],
        lambda model: [model({name: x}) for x in batches],
    ):
        assert grids(sim.fork().calibrate(run)) == by_data
    with pytest.raises(InputError, match="takes"):
        sim.calibrate(lambda model: model(batches[0], batches[0], batches[0]))


def test_the_function_is_called_once_whatever_the_scheme_and_its_results_are_the_float_ones(sim):
    _, batches = batches_for(sim)
    calls, results = [], []

    def run(model):
        calls.append(model)
        results.extend(model(x) for x in batches)

    sim.calibrate(run)
    assert len(calls) == 1
    (expected,) = sim.predict(batches, simulated=False)
    assert np.allclose(np.concatenate(results), expected, atol=1e-6)


def test_techniques_take_a_forward_pass_too(sim):
    _, batches = batches_for(sim)

    def run(model):
        for x in batches:
            model(x)

    a, b = sim.fork().apply("bias_correction", run), sim.fork().apply("bias_correction", batches)
    assert all(np.array_equal(a.state.params[p], b.state.params[p]) for p in a.graph.params)


def test_a_buffer_that_is_used_again_is_copied(sim):
    _, batches = batches_for(sim)
    buffer = np.empty_like(batches[0])

    def run(model):
        for x in batches:
            buffer[:] = x
            model(buffer)

    assert grids(sim.fork().calibrate(run)) == grids(sim.fork().calibrate(batches))


def test_what_is_more_than_memory_should_hold_lies_in_files_and_they_go(monkeypatch):
    monkeypatch.setattr(forward, "HELD_BYTES", 100)
    recording = forward.Recording()
    feeds = [{"file": RNG.normal(size=(2, 4)).astype(np.float32), "a/b": np.arange(2)} for _ in range(4)]
    for feed in feeds:
        recording.add(feed)
    folder = recording._folder.path
    kinds = [isinstance(f, dict) for f in recording._feeds]
    assert kinds == [True, True, False, False]
    for _ in range(2):
        for found, feed in zip(recording, feeds, strict=True):
            assert list(found) == list(feed)
            assert all(np.array_equal(found[n], feed[n]) and found[n].dtype == feed[n].dtype for n in feed)
    specs = {"file": ((None, 4), "float32"), "a/b": ((None,), "int64")}
    dataset = open_data(recording, specs)
    assert dataset.samples == 8
    del recording, dataset, found
    gc.collect()
    assert not forward.Path(folder).exists()


def test_functions_that_can_not_serve_are_refused(sim):
    with pytest.raises(InputError, match="'idle' never ran the model"):

        def idle(model):
            pass

        sim.calibrate(idle)
    with pytest.raises(InputError, match=r"needs 2 arguments; .*lambda model: forward\(model"):
        sim.calibrate(lambda model, args: None)
    _, batches = batches_for(sim)
    with pytest.raises(InputError, match=r"call 1 of the model.*NaN"):
        sim.calibrate(lambda model: [model(batches[0]), model(batches[0] * np.nan)])
    assert not sim.encodings


def test_errors_of_the_user_s_function_come_through_and_nothing_changes(sim):
    _, batches = batches_for(sim)

    def run(model):
        model(batches[0])
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        sim.calibrate(run)
    assert not sim.encodings


def test_temporary_files_of_a_forward_pass_that_is_interrupted_go_at_once(monkeypatch, sim):
    """Though the error, and all that it refers to, is kept."""
    monkeypatch.setattr(forward, "HELD_BYTES", 0)
    _, batches = batches_for(sim)
    folders = []
    add = forward.Recording.add
    monkeypatch.setattr(
        forward.Recording, "add", lambda self, feed: (add(self, feed), folders.append(self._folder.path))[0]
    )

    def run(model):
        for x in batches:
            model(x)
        raise KeyboardInterrupt

    before = sim.state
    with pytest.raises(KeyboardInterrupt) as kept:
        sim.calibrate(run)
    assert folders and not folders[0].exists()
    assert sim.state is before
    assert kept.value.__traceback__ is not None
