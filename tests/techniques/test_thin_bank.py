"""Banks whose moments count some positions: solved on them is what is solved on data with the same setting."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright import RunDirectory
from bitwright.bank import Bank, collect, merge
from bitwright.errors import InputError
from bitwright.testing import models
from bitwright.workers import open_workers

PORT = FRAMEWORKS.get("onnx")
onnx_only = pytest.mark.skipif(PORT is None, reason="needs ONNX")
THIN = 8


def network():
    return models.depthwise_triple(relu6=False)


@pytest.fixture(scope="module")
def sim():
    return PORT.sim(network(), weights="int4").apply("fold_batch_norm")


def samples(sim, count=32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.gamma(2, 1, (count, *shape[1:])).astype(np.float32) for name, (shape, _) in sim.state.inputs.items()
    }


@pytest.fixture(scope="module")
def bank(sim, tmp_path_factory):
    return collect(sim, samples(sim), tmp_path_factory.mktemp("banks") / "bank", thin=THIN)


def same_weights(one, other):
    for site in one.plan.parameters:
        assert one.encodings[site].equals(other.encodings[site]), site
        np.testing.assert_array_equal(one.params[site], other.params[site], err_msg=site)


def counts(bank):
    return {op: bank.record.moments[place].count for op, place in bank.record.layers.items()}


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("technique", ["gptq", "seq_mse"])
def test_codes_are_those_from_data_with_the_same_setting(name, technique, tmp_path):
    sim = FRAMEWORKS[name].sim(network(), weights="int4").apply("fold_batch_norm")
    data = samples(sim)
    bank, full = (collect(sim, data, tmp_path / str(t), thin=t) for t in (THIN, None))
    assert all(counts(bank)[op] <= n for op, n in counts(full).items())
    assert sum(counts(bank).values()) < sum(counts(full).values()), "every position was counted"
    on_data = sim.fork().apply(technique, data, inputs="float", thin=THIN)
    on_bank = sim.fork().apply(technique, bank)
    same_weights(on_bank, on_data)
    assert f"on a bank of 32 samples with thin={THIN}" in on_bank.reports[-1][1].summary
    other = sim.fork().apply(technique, full)
    changed = [s for s in sim.plan.parameters if (other.params[s] != on_bank.params[s]).any()]
    assert changed or any(not other.encodings[s].equals(on_bank.encodings[s]) for s in sim.plan.parameters)
    on_bank.calibrate(bank)


@onnx_only
def test_histograms_and_ranges_are_of_all_values(sim, bank, tmp_path):
    full = collect(sim, samples(sim), tmp_path / "full")
    for file in ("codes.npy", "counts.npy", "ranges.npy"):
        assert bank.record.files[file] == full.record.files[file], file
    assert bank.record.thin == THIN
    assert Bank.open(bank.path).fingerprint() != full.fingerprint()


@onnx_only
def test_the_bank_is_the_same_whether_or_not_the_session_picks(sim, bank, tmp_path, monkeypatch):
    """To the bit, in shares too, of which each begins with another sample."""
    from bitwright_onnx.simulate.session import OrtSession

    data = sim.open(samples(sim), batch_size=4)
    asked = []
    run = OrtSession.run_at
    monkeypatch.setattr(OrtSession, "run_at", lambda self, *given: asked.append(given[1]) or run(self, *given))
    picking = [collect(sim, data, tmp_path / f"picking {share}", thin=THIN, share=share) for share in (None, 3)]
    assert any(asked), "nothing was picked"
    monkeypatch.setattr("bitwright.bank._requests._spatial", lambda *given: None)
    asked.clear()
    whole = [collect(sim, data, tmp_path / f"whole {share}", thin=THIN, share=share) for share in (None, 3)]
    assert not any(asked)
    for one, other in zip(picking, whole, strict=True):
        assert one.record.files == other.record.files


@onnx_only
def test_quantized_inputs_with_residuals(sim):
    """Every way in which moments are collected on data takes the setting."""
    data = samples(sim, 64)
    thin, full = (sim.fork().apply("adaround", data, inputs="quantized", iterations=50, thin=t) for t in (4, None))
    assert any((thin.params[s] != full.params[s]).any() for s in sim.plan.parameters)


@onnx_only
@pytest.mark.parametrize("technique", ["gptq", "adaround", "seq_mse", "weight_clipping", "low_rank"])
def test_a_bank_of_other_positions_is_refused(technique, sim, bank, tmp_path):
    with pytest.raises(InputError, match=f"thin=3, but the moments of bank .* were collected with thin={THIN}; leave"):
        sim.fork().apply(technique, bank, thin=3)
    full = collect(sim, samples(sim, 8), tmp_path / "full")
    with pytest.raises(InputError, match="count every position; leave thin out, or collect another bank"):
        sim.fork().apply(technique, full, thin=THIN)
    one, other = (sim.fork().apply(technique, bank, **given) for given in ({"thin": THIN}, {}))
    for site in set(one.plan.parameters) & set(other.plan.parameters):
        np.testing.assert_array_equal(one.params[site], other.params[site], err_msg=site)


@onnx_only
def test_merged_is_one_run(sim, bank, tmp_path):
    """Of parts of whole turns, 16 samples."""
    parts = [
        collect(sim, {k: v[p] for k, v in samples(sim).items()}, tmp_path / n, thin=THIN)
        for n, p in (("one", slice(0, 16)), ("two", slice(16, 32)))
    ]
    joined, other = merge(parts, tmp_path / "joined"), merge(parts[::-1], tmp_path / "reversed")
    assert joined.record.thin == THIN
    assert joined.record.files == other.record.files
    for op in sim.graph.linear_ops:
        ours, one = joined.layer(op), bank.layer(op)
        assert ours.count == one.count
        np.testing.assert_allclose(ours.xx, one.xx, rtol=1e-6, atol=1e-6 * np.abs(one.xx).max())
    full = collect(sim, samples(sim, 8, seed=3), tmp_path / "full")
    with pytest.raises(InputError, match=f"moments of different positions, .*thin={THIN}.*; collect with the same"):
        merge([bank, full], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@onnx_only
def test_shares_are_the_same_wherever_they_are_collected(sim, tmp_path):
    data = sim.open(samples(sim), batch_size=4)
    here = collect(sim, data, tmp_path / "here", share=2, thin=THIN)
    with open_workers(ThreadPoolExecutor(3)) as workers:
        there = collect(sim.fork().attach(executor=workers), data, tmp_path / "there", share=2, thin=THIN)
    assert there.record == here.record


@onnx_only
@pytest.mark.parametrize("workers", [False, True])
def test_shares_go_on_with_the_positions(workers, sim, bank, tmp_path):
    """In shares of one sample, each would otherwise have the positions of the first."""
    data = sim.open(samples(sim), batch_size=1)
    with open_workers(ThreadPoolExecutor(3)) as crew:
        twin = sim.fork().attach(executor=crew) if workers else sim
        found = collect(twin, data, tmp_path / "bank", share=1, thin=THIN)
    for op in sim.graph.linear_ops:
        ours, whole = found.layer(op), bank.layer(op)
        assert ours.count == whole.count
        np.testing.assert_allclose(ours.xx, whole.xx, rtol=1e-5, atol=1e-5 * np.abs(whole.xx).max())


@onnx_only
def test_a_bank_that_is_there_is_kept_only_if_it_counts_the_same(sim, bank, tmp_path):
    copy = shutil.copytree(bank.path, tmp_path / "copy")
    assert collect(sim, samples(sim), copy, thin=THIN).record == bank.record
    for thin in (None, THIN + 1):
        with pytest.raises(InputError, match="is there already"):
            collect(sim, samples(sim), copy, thin=thin)
    with pytest.raises(InputError, match="thin=0: moments count one position"):
        collect(sim, samples(sim), tmp_path / "none", thin=0)


@onnx_only
def test_few_columns_are_told(sim, tmp_path, recwarn):
    told = "thin leaves fewer than 4 columns for each input feature of .*; give more samples, or count more positions"
    with pytest.warns(UserWarning, match=f"collect: {told}"):
        collect(sim, samples(sim, 2), tmp_path / "few", thin=1000)
    with pytest.warns(UserWarning, match=f"gptq: {told}"):
        sim.fork().apply("gptq", samples(sim, 2), inputs="float", thin=1000)
    recwarn.clear()
    collect(sim, samples(sim, 2), tmp_path / "all")
    collect(sim, samples(sim, 64), tmp_path / "enough", thin=THIN)
    assert not [w for w in recwarn if "thin" in str(w.message)]


@onnx_only
def test_few_columns_are_told_when_a_run_is_resumed_too(tmp_path):
    for _ in range(2):
        with RunDirectory(tmp_path / "run") as run:
            sim = PORT.sim(network(), weights="int4", run=run).apply("fold_batch_norm")
            with pytest.warns(UserWarning, match="gptq: thin leaves fewer than 4 columns"):
                sim.apply("gptq", samples(sim, 2), inputs="float", thin=1000)


@onnx_only
def test_the_command(sim, run, tmp_path):
    model = tmp_path / "model.onnx"
    PORT.sim(network()).backend.save(PORT.sim(network()).state.native, model)
    np.savez(tmp_path / "data.npz", **samples(sim))
    done = run("collect", model, "--data", tmp_path / "data.npz", "--techniques", "fold_batch_norm", "--thin", THIN,
               "--out", tmp_path / "bank")  # fmt: skip
    assert done.status == 0, done.err
    assert f"thin {THIN}: each layer has" in done.out
    assert Bank.open(tmp_path / "bank").record.thin == THIN
    done = run("collect", model, "--data", tmp_path / "data.npz", "--thin", 0, "--out", tmp_path / "other")
    assert done.status == 2
