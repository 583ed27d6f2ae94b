"""The bank: solved on it is what is solved on data, in every framework; nothing runs, and nothing wrong is taken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright.bank import Bank, collect, merge
from bitwright.errors import InputError
from bitwright.files import Scratch
from bitwright.statistics import HistogramStatistic, LayerMoments, RangeStatistic
from bitwright.testing import models
from bitwright.workers import Flight, open_workers

PORT = FRAMEWORKS.get("onnx")
onnx_only = pytest.mark.skipif(PORT is None, reason="needs ONNX")


def network():
    return models.depthwise_triple(relu6=False)


@pytest.fixture(scope="module")
def sim():
    return PORT.sim(network(), weights="int4").apply("fold_batch_norm")


def samples(sim, count=24, seed=0):
    """Uneven ones, so that layers' moments differ."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.gamma(2, 1, (count, *shape[1:])).astype(np.float32) for name, (shape, _) in sim.state.inputs.items()
    }


@pytest.fixture(scope="module")
def bank(sim, tmp_path_factory):
    return collect(sim, samples(sim), tmp_path_factory.mktemp("banks") / "bank")


@pytest.fixture
def copied(bank, tmp_path):
    return shutil.copytree(bank.path, tmp_path / "copy")


def same_weights(one, other):
    for site in one.plan.parameters:
        a, b = one.encodings[site], other.encodings[site]
        assert a.equals(b), site
        np.testing.assert_array_equal(a.quantize(one.params[site]), b.quantize(other.params[site]), err_msg=site)


# -- what is solved


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_codes_from_a_bank_are_those_from_data(name, tmp_path, monkeypatch):
    """With float inputs, in every framework, and though the model can't be run any more."""
    sim = FRAMEWORKS[name].sim(network(), weights="int4").apply("fold_batch_norm")
    data = samples(sim)
    bank = collect(sim, data, tmp_path / "bank")
    on_data = sim.fork().apply("gptq", data, inputs="float")
    monkeypatch.setattr(type(sim.backend), "session", None)
    monkeypatch.setattr(type(sim.backend), "simulate", None)
    on_bank = sim.fork().apply("gptq", bank)
    same_weights(on_bank, on_data)
    for op in sim.graph.linear_ops:
        moved = on_bank.params[op.weight] != sim.params[op.weight]
        assert moved.any(), "nothing was rounded"
    on_bank.calibrate(bank)
    assert all(site in on_bank.encodings for site in on_bank.plan.activations)


@onnx_only
@pytest.mark.parametrize(
    ("technique", "settings"),
    [
        ("adaround", {"inputs": "float"}),
        ("seq_mse", {"inputs": "float"}),
        ("weight_clipping", {}),
    ],
)
def test_techniques_on_moments_are_those_on_data(technique, settings, sim, bank):
    on_bank, on_data = (sim.fork().apply(technique, data, **settings) for data in (bank, samples(sim)))
    same_weights(on_bank, on_data)
    assert "on a bank of 24 samples" in on_bank.reports[-1][1].summary
    assert "bank" not in on_data.reports[-1][1].summary


@onnx_only
def test_biases_keep_the_mean_of_the_float_input(sim, bank):
    """W E[x] − Ŵ E[x], with E[x] of the float network."""
    corrected = sim.fork().apply("bias_correction", bank)
    x = samples(sim)
    for op in sim.graph.linear_ops:
        bias = next(p for role, p in op.params.items() if p != op.weight)
        assert not np.array_equal(corrected.params[bias], sim.params[bias])
    first = sim.graph.linear_ops[0]
    moments = bank.layer(first, products=False)
    direct = LayerMoments(first, moments.mean.shape[1], paired=False, products=False)
    direct.update(next(iter(x.values())))
    np.testing.assert_allclose(moments.mean, direct.mean, rtol=1e-6)


@onnx_only
@pytest.mark.parametrize("scheme", ["minmax", "percentile", "sqnr", "mse", "entropy"])
def test_ranges_are_those_of_the_float_network(scheme, sim, bank):
    """Weights of 16 bits are almost float: what data give then is what the bank gives at any width."""
    fine = PORT.sim(network(), weights="int16", scheme=scheme).apply("fold_batch_norm")
    fine.calibrate(samples(sim))
    coarse = sim.fork(scheme=scheme).calibrate(bank)
    for site in coarse.plan.activations:
        np.testing.assert_allclose(coarse.encodings[site].scale, fine.encodings[site].scale, rtol=2e-4, err_msg=site)
    name, report = coarse.reports[-1]
    assert name == "calibrate"
    assert "histograms of the float network" in report.summary
    coarse.predict(samples(sim))


@onnx_only
def test_a_histogram_is_the_one_that_calibration_collects(sim, bank):
    """Bit for bit: its bins at fewer mantissa bits, its ends with and without all values."""
    tensor = sim.graph.inputs[0]
    whole = HistogramStatistic(step=bank.record.tensors[tensor].step, layout=bank.record.tensors[tensor].layout)
    whole.update(samples(sim)[tensor])
    held = bank.histogram(tensor, 9)
    for key, values in whole.state().items():
        np.testing.assert_array_equal(held.state()[key], values, err_msg=key)
    with pytest.raises(InputError, match="10 bits of mantissa"):
        bank.histogram(tensor, 11)


@onnx_only
@pytest.mark.parametrize("technique", ["smooth_quant", "awq"])
def test_channel_factors_are_chosen_on_moments(technique, tmp_path):
    """The float function stays; the bank doesn't hold behind it, since inputs are others now."""
    sim = PORT.sim(models.prenormed(), weights="int4")
    data = samples(sim)
    bank = collect(sim, data, tmp_path / "bank")
    done = sim.fork().apply(technique, bank)
    assert done.reports[-1][1].figures["scaled"] > 0
    for before, after in zip(sim.predict(data, simulated=False), done.predict(data, simulated=False), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4 * np.abs(before).max())
    with pytest.raises(InputError, match=f"{technique} changed the network since"):
        done.calibrate(bank)


# -- where it is valid


@onnx_only
def test_rounding_keeps_it_valid_and_changed_inputs_do_not(sim, bank):
    twice = sim.fork().apply("gptq", bank).apply("bias_correction", bank).calibrate(bank)
    assert [n for n, _ in twice.reports[-3:]] == ["gptq", "bias_correction", "calibrate"]
    with pytest.raises(InputError, match="cross_layer_equalization changed the network since: collect behind"):
        sim.fork().apply("cross_layer_equalization").calibrate(bank)
    with pytest.raises(InputError, match="another network"):  # what was rounded on data isn't what the bank refers to
        sim.fork().apply("gptq", samples(sim), inputs="float").calibrate(bank)
    other = PORT.sim(models.conv_bn_relu(), weights="int4").apply("fold_batch_norm")
    with pytest.raises(InputError, match="another network"):
        other.apply("gptq", bank)


@onnx_only
def test_techniques_that_can_do_without_go_on(sim, bank):
    """Equalization asks for ranges that it doesn't need: on a bank behind other steps it has none."""
    done = PORT.sim(network(), weights="int4").apply("fold_batch_norm", bank).apply("cross_layer_equalization", bank)
    without = PORT.sim(network(), weights="int4").apply("fold_batch_norm").apply("cross_layer_equalization")
    for id in without.graph.params:
        np.testing.assert_array_equal(done.params[id], without.params[id])


@onnx_only
@pytest.mark.skipif(sys.platform == "win32", reason="folders aren't locked there")
def test_a_bank_that_is_whole_is_handed_out_and_what_a_failed_run_left_goes(sim, tmp_path, monkeypatch):
    """The run that finds it whole makes no folder of its own that would sweep others."""
    made = collect(sim, samples(sim), tmp_path / "bank")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    scratch = Scratch()
    left = shutil.copytree(scratch.path, scratch.path.with_name(f"{scratch.path.name}x"))
    scratch.close()
    again = collect(sim, samples(sim), tmp_path / "bank")
    assert again.record == made.record
    assert not left.exists()


@onnx_only
def test_what_has_to_run_is_refused(sim, bank):
    calibrated = sim.fork().calibrate(bank)
    with pytest.raises(InputError, match=r"needs data.*only statistics"):
        calibrated.predict(bank)
    with pytest.raises(InputError, match="this is a bank"):
        collect(sim, bank, bank.path.with_name("again"))
    raw = PORT.sim(models.conv_bn_relu())
    there = collect(raw, samples(raw), bank.path.with_name("raw"))
    with pytest.raises(InputError, match="quantized network"):
        raw.apply("batch_norm_reestimation", there)


@onnx_only
def test_a_layer_that_is_left_out_is_named(sim, tmp_path):
    first, *others = sim.graph.linear_ops
    some = collect(sim, samples(sim), tmp_path / "some", layers=[first.id])
    assert set(some.record.left_out) == {op.id for op in others}
    with pytest.warns(UserWarning, match=f"{others[0].id!r}.*the bank has no moments of it"):
        done = sim.fork().apply("gptq", some)
    assert done.encodings[first.weight].frozen
    none = collect(sim, samples(sim), tmp_path / "none", budget_gib=0.0)
    assert set(none.record.left_out) == {op.id for op in sim.graph.linear_ops}
    assert not any(f.startswith("moments") for f in none.record.files)
    with pytest.raises(InputError, match="matches no linear layer"):
        collect(sim, samples(sim), tmp_path / "x", layers=["nothing*"])


# -- merging


@onnx_only
def test_merged_is_one_run(sim, bank, tmp_path):
    """Histograms and ranges to the bit, moments to float64 rounding, in any order the same bytes."""
    whole = samples(sim)
    parts = []
    for i, piece in enumerate((slice(0, 8), slice(8, 12), slice(12, 24))):
        parts.append(collect(sim, {k: v[piece] for k, v in whole.items()}, tmp_path / f"part{i}"))
    joined, other = merge(parts, tmp_path / "joined"), merge(parts[::-1], tmp_path / "reversed")
    assert joined.record.samples == 24
    assert joined.record.files == other.record.files
    for file in ("codes.npy", "counts.npy", "ranges.npy"):
        assert joined.record.files[file] == bank.record.files[file], file
    for op in sim.graph.linear_ops:
        for field in ("mean", "xx"):
            ours, one = getattr(joined.layer(op), field), getattr(bank.layer(op), field)
            # Products of a batch are sums in float32, and the batches here are others.
            np.testing.assert_allclose(ours, one, rtol=1e-6, atol=1e-6 * np.abs(one).max(), err_msg=f"{op.id} {field}")
    same_batches = [collect(sim, {k: v[p] for k, v in whole.items()}, tmp_path / n, number="float64")
                    for n, p in (("first", slice(0, 8)), ("second", slice(8, 24)))]  # fmt: skip
    exact, seen = merge(same_batches, tmp_path / "exact"), False
    full = collect(sim, whole, tmp_path / "full", number="float64")
    for op in sim.graph.linear_ops:
        ours, one = exact.layer(op), full.layer(op)
        # Steady features are summed about the first batch's mean, which is another for the second bank.
        moving = ~ours.state()["shift_x"].any(axis=0)
        seen |= bool(moving.any())
        sums, once = (m.state()["xx"][..., moving][:, moving] for m in (ours, one))
        np.testing.assert_allclose(sums, once, rtol=1e-13)
        np.testing.assert_allclose(ours.xx, one.xx, rtol=1e-6, atol=1e-6 * np.abs(one.xx).max())
    assert seen, "no feature varies"
    # Scales that are fitted to codes would have the moments' last digits.
    same_weights(*(sim.fork().apply("gptq", b, scales="keep") for b in (exact, bank)))


@onnx_only
def test_what_doesnt_belong_together_isnt_merged(sim, bank, tmp_path):
    copy = shutil.copytree(bank.path, tmp_path / "copy")
    with pytest.raises(InputError, match="on the same data, which would count twice"):
        merge([bank, copy], tmp_path / "out")
    double = collect(sim, samples(sim, 8, seed=3), tmp_path / "double", number="float64")
    with pytest.raises(InputError, match="hold moments of different types"):
        merge([bank, double], tmp_path / "out")
    other = PORT.sim(models.conv_bn_relu())
    foreign = collect(other, samples(other, 8, seed=3), tmp_path / "foreign")
    with pytest.raises(InputError, match="different networks"):
        merge([bank, foreign], tmp_path / "out")
    with pytest.raises(InputError, match="two or more"):
        merge([bank], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    alone = collect(sim, samples(sim, 8, seed=3), tmp_path / "alone")
    assert alone.bytes < double.bytes
    same_weights(sim.fork().apply("gptq", double), sim.fork().apply("gptq", alone))


# -- shares


@onnx_only
def test_shares_are_the_same_wherever_they_are_collected(sim, bank, tmp_path):
    """Here and on workers: the same files, in whatever order shares are done; histograms are those of one run."""
    data = sim.open(samples(sim), batch_size=4)
    here = collect(sim, data, tmp_path / "here", share=2)
    with open_workers(ThreadPoolExecutor(3)) as workers:
        crew = sim.fork().attach(executor=workers)
        there = collect(crew, data, tmp_path / "there", share=2)
    assert there.record.files == here.record.files
    assert there.record.data == here.record.data
    assert sorted(p.name for p in there.path.iterdir()) == sorted([*here.record.files, "bank.json"])
    for file in ("codes.npy", "counts.npy", "ranges.npy"):
        assert here.record.files[file] == bank.record.files[file], file
    for op in sim.graph.linear_ops:
        ours, one = here.layer(op), bank.layer(op)
        assert ours.count == one.count
        np.testing.assert_allclose(ours.mean, one.mean, rtol=1e-6)
        np.testing.assert_allclose(ours.xx, one.xx, rtol=1e-6, atol=1e-6 * np.abs(one.xx).max())
    with pytest.raises(InputError, match="empty"):
        collect(sim, sim.open(samples(sim, 0), batch_size=4), tmp_path / "empty", share=2)


@onnx_only
def test_workers_that_stay_open_the_network_anew(sim, tmp_path):
    """The next collection into the same folder may be of other weights: a pool keeps what it has opened by its path."""
    data = sim.open(samples(sim), batch_size=4)
    other = sim.fork().apply("cross_layer_equalization")
    expected = collect(other, data, tmp_path / "expected", share=2)
    with open_workers(ThreadPoolExecutor(3)) as workers:
        collect(sim.fork().attach(executor=workers), data, tmp_path / "bank", share=2)
        shutil.rmtree(tmp_path / "bank")
        found = collect(other.attach(executor=workers), data, tmp_path / "bank", share=2)
    assert found.record.files == expected.record.files


@onnx_only
@pytest.mark.skipif(sys.platform == "win32", reason="kills a process")
def test_a_worker_that_dies_costs_its_share(sim, tmp_path, monkeypatch):
    import deadly_worker

    from bitwright.bank import _shares

    monkeypatch.setattr(_shares, "share_of", deadly_worker.share_of)
    data = sim.open(samples(sim), batch_size=8)
    there = collect(sim.fork().attach(executor=2), data, tmp_path / "there", share=1)
    assert (tmp_path / "killed").exists()
    assert there.record.files == collect(sim, data, tmp_path / "here", share=1).record.files


# -- files


def rewritten(folder, change):
    """Change the index, and make its checksum right again, as whoever forges one would."""
    from bitwright.bank._record import _digest

    path = folder / "bank.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps({**content, "sha256": _digest(content)}))


@onnx_only
def test_files_that_are_cut_off_while_a_bank_is_used_are_an_error_and_no_signal(sim, copied):
    opened = Bank.open(copied)
    sim.fork().calibrate(opened)
    for name in ("counts.npy", "moments-0.npy"):
        os.truncate(copied / name, 200)
    with pytest.raises(InputError, match=r"counts\.npy was changed while it was in use"):
        sim.fork().calibrate(opened)
    with pytest.raises(InputError, match=r"'moments-0.npy' isn't what was collected"):
        sim.fork().apply("gptq", opened)


@onnx_only
def test_damaged_files_are_refused(sim, bank, copied):
    file = copied / "moments-0.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-8] + bytes(8))
    opened = Bank.open(copied)
    with pytest.raises(InputError, match=r"'moments-0.npy' isn't what was collected"):
        opened.verify()
    with pytest.raises(InputError, match="isn't what was collected"):
        sim.fork().apply("gptq", opened)
    file.write_bytes(good[:-8])
    with pytest.raises(InputError, match=r"'moments-0.npy' has \d+ bytes in place of"):
        Bank.open(copied)
    file.unlink()
    with pytest.raises(InputError, match="is missing"):
        Bank.open(copied)
    index = copied / "bank.json"
    index.write_text(index.read_text().replace('"samples": 24', '"samples": 25'))
    with pytest.raises(InputError, match="was changed after it was written"):
        Bank.open(copied)
    index.write_text("{")
    with pytest.raises(InputError, match="can't be read"):
        Bank.open(copied)
    index.write_text("[" * 100_000)
    with pytest.raises(InputError, match="can't be read"):
        Bank.open(copied)
    index.unlink()
    with pytest.raises(InputError, match=r"is no bank: it has no bank.json"):
        Bank.open(copied)


def forged_file(folder, name, values):
    np.save(folder / name, values, allow_pickle=values.dtype.hasobject)
    raw = (folder / name).read_bytes()
    rewritten(
        folder, lambda c: c["files"].update({name: {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}})
    )


@onnx_only
@pytest.mark.parametrize(
    ("name", "make", "told"),
    [
        ("moments-0.npy", lambda v: np.full(v.shape, {}, object), "Python objects"),
        ("moments-0.npy", lambda v: v[:, :-1], "expected float32"),
        ("moments-0.npy", lambda v: v.astype(np.float64), "expected float32"),
        ("moments-0.npy", lambda v: np.full_like(v, np.inf), "aren't finite"),
        ("means.npy", lambda v: v[:, :3], "shorter than its index says"),
        ("counts.npy", lambda v: -v, "bins that there can't be"),
        ("codes.npy", lambda v: v + (1 << 19), "bins that there can't be"),
        ("ranges.npy", lambda v: v[::-1], "is none"),
    ],
)
def test_forged_arrays_are_refused(name, make, told, sim, copied):
    """With checksums that are right: what they hold is looked at all the same."""
    forged_file(copied, name, make(np.array(np.load(copied / name))))
    with pytest.raises(InputError, match=told):
        opened = Bank.open(copied)
        sim.fork().apply("gptq", opened).calibrate(opened).fork(scheme="minmax").calibrate(opened)


@onnx_only
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.update(format=2), "a bank of format 2; this version reads 1"),
        (lambda c: c.update(kind="soup"), "isn't the index of a bank"),
        (lambda c: c["files"].update({"../x.npy": c["files"]["means.npy"]}), "is missing"),
        (lambda c: c["moments"][0].update(file="../../x.npy"), "file"),
        (lambda c: c["moments"][0].update(count=0), "count"),
        (lambda c: c["layers"].update(other=99), "'other' aren't among"),
        (lambda c: c.update(surprise=1), "surprise"),
    ],
)
def test_forged_indexes_are_refused(change, told, copied):
    rewritten(copied, change)
    with pytest.raises(InputError, match=told):
        Bank.open(copied)


@onnx_only
def test_moments_of_another_width_are_refused(sim, copied):
    rewritten(copied, lambda c: c["moments"][0].update(features=2, means=[0, 2 * c["moments"][0]["groups"]]))
    with pytest.raises(InputError, match="expected float32"):
        sim.fork().apply("gptq", Bank.open(copied))


@onnx_only
def test_nothing_is_half_written(sim, bank, tmp_path):
    def failing():
        yield samples(sim)
        raise RuntimeError("the disk of the data is gone")

    state = {"first": True}

    def data():
        if state.pop("first", False):
            return iter([samples(sim)])
        return failing()

    with pytest.raises(RuntimeError, match="gone"):
        collect(sim, data, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    bad = samples(sim)
    next(iter(bad.values()))[3] = np.nan
    with pytest.raises(InputError, match="NaN"):
        collect(sim, [bad], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@onnx_only
def test_a_bank_that_is_there_already_is_kept(sim, bank, copied, tmp_path):
    """The same collection again, as after a kill in its last moment, gives it; another one leaves it alone."""
    before = {p.name: p.stat().st_mtime_ns for p in bank.path.iterdir()}
    assert collect(sim, samples(sim), bank.path).record == bank.record
    other, some = samples(sim, seed=9), [sim.graph.linear_ops[0].id]
    for wrong in ({"data": other}, {"number": "float64"}, {"layers": some}, {"budget_gib": 0.0}):
        with pytest.raises(InputError, match="is there already"):
            collect(sim, **{"data": samples(sim), **wrong}, out=bank.path)
    assert {p.name: p.stat().st_mtime_ns for p in bank.path.iterdir()} == before
    (copied / "means.npy").write_bytes(bytes((copied / "means.npy").stat().st_size))
    with pytest.raises(InputError, match="isn't what was collected"):
        collect(sim, samples(sim), copied)
    second = collect(sim, samples(sim, 8, seed=5), tmp_path / "second")
    both = merge([bank, second], tmp_path / "both")
    assert merge([second, bank], tmp_path / "both").record == both.record
    with pytest.raises(InputError, match="is there already"):
        merge([bank, collect(sim, samples(sim, 8, seed=6), tmp_path / "third")], tmp_path / "both")


KILLED = """
import os, signal, sys
from pathlib import Path
real = Path.rename
def rename(self, target):
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename
from bitwright.bank import merge
merge(sys.argv[1:3], sys.argv[3])
"""


@onnx_only
@pytest.mark.skipif(sys.platform == "win32", reason="asks for processes")
def test_what_a_killed_process_leaves_is_swept(sim, bank, tmp_path):
    other, out = collect(sim, samples(sim, 8, seed=5), tmp_path / "other"), tmp_path / "out"
    died = subprocess.run([sys.executable, "-c", KILLED, str(bank.path), str(other.path), str(out)], check=False)
    assert died.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".out.*.partial")
    assert (left / "bank.json").is_file()
    assert not out.exists()
    merge([bank, other], out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


# -- requests


@onnx_only
def test_requests_are_answered_or_refused(sim, bank):
    from bitwright.bank import BankView
    from bitwright.statistics import Request

    view, op = BankView(bank, sim.state), sim.graph.linear_ops[0]
    tensor = op.data_inputs[0]
    value = samples(sim)[tensor]
    by_channel, whole = RangeStatistic(1, reduction="none"), RangeStatistic(reduction="none")
    by_channel.update(value), whole.update(value)
    answers = view.statistics(
        [Request("a", (tensor,), lambda: RangeStatistic(1)), Request("b", (tensor,), RangeStatistic)], "test"
    )
    np.testing.assert_array_equal(answers["a"].high, by_channel.high)
    np.testing.assert_array_equal(answers["b"].low, whole.low)
    finer = Request("c", (tensor,), lambda: HistogramStatistic(1))
    with pytest.raises(InputError, match="asks for a HistogramStatistic of"):
        view.statistics([finer], "test")
    with pytest.raises(InputError, match="knows nothing of tensor 'nowhere'; collect with this target"):
        view.statistics([Request("d", ("nowhere",), RangeStatistic)], "test")
    paired = Request("e", (tensor, tensor), lambda: LayerMoments(op, 9), ("float", "simulated"))
    with pytest.raises(InputError, match="measures the quantized network"):
        view.statistics([paired], "test")


@onnx_only
def test_layers_are_solved_on_workers(sim, bank, monkeypatch):
    """All at once: a bank's layers don't depend on one another."""
    sent, submit = [], Flight.submit

    def counted(flight, name, *task):
        sent.append(name)
        submit(flight, name, *task)

    monkeypatch.setattr(Flight, "submit", counted)
    here = sim.fork().apply("gptq", bank)
    assert not sent
    with open_workers(ThreadPoolExecutor(2)) as workers:
        there = sim.fork().attach(executor=workers).apply("gptq", bank)
    assert sent == [op.id for op in sim.graph.linear_ops]
    same_weights(there, here)


@onnx_only
def test_tensors_of_one_target_alone_are_asked_for(tmp_path):
    """htp_v66 has a grid ahead of each activation; no other preset has, and a bank for all of them does without."""
    sim = PORT.sim(network(), weights="int4").apply("fold_batch_norm")
    other = PORT.sim(network(), weights="int4", target="htp_v66").apply("fold_batch_norm")
    needed = {t for site in other.plan.activations for t in other.plan.observed(site)}
    usual, named = (collect(s, samples(sim), tmp_path / str(n)) for n, s in enumerate((sim, other)))
    assert usual.record.tensors.keys() < named.record.tensors.keys()
    assert needed <= named.record.tensors.keys()
    for target in ("default", "htp_v68", "htp_v73", "onnxruntime-cpu", "tflite-int8"):
        PORT.sim(network(), weights="int4", target=target).apply("fold_batch_norm").calibrate(usual)
    with pytest.raises(InputError, match=r"knows nothing of tensor .*; collect with this target .*--target"):
        other.fork().calibrate(usual)
    other.calibrate(named)
