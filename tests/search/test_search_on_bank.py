"""Searches on a bank: noise in closed form is what data give, nothing but the evaluation runs, and it is said."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bitwright.backend import Tap
from bitwright.bank import Bank, collect, tensor_noise, weight_noise
from bitwright.errors import InputError
from bitwright.simulation import QuantSim
from bitwright_search.auto_quantize import auto_quantize
from bitwright_search.mixed_precision import mixed_precision


@pytest.fixture(scope="module")
def bank(net, tmp_path_factory):
    sim = QuantSim(net.model).apply("fold_batch_norm")
    return collect(sim, net.images, tmp_path_factory.mktemp("bank") / "bank")


def outputs(sim, data, tensor, simulated=None):
    tap = Tap(tensor)
    session = sim.backend.session(sim.native, [tap]) if simulated is None else simulated.session([tap])
    return np.concatenate([np.asarray(session.run(batch)[tap], np.float64) for batch in sim.open(data)])


def test_noise_of_weights_is_that_of_their_layers_outputs(net, bank):
    """Rounded weights in the float network: the variance of the layer's error over that of its output."""
    sim = QuantSim(net.model, weights="int4").apply("fold_batch_norm").calibrate(net.images)
    op = sim.graph.linear_ops[0]
    simulation = sim.backend.simulate(sim.native, sim.plan, sim.table)
    simulation.set({s: None for s in sim.plan.quantized if sim.plan.root(s) == s and s != op.weight})
    exact, rounded = outputs(sim, net.images, op.output), outputs(sim, net.images, op.output, simulation)

    def spread(values):
        return np.square(values - values.mean(axis=(0, 2, 3), keepdims=True)).sum()

    found = weight_noise(bank, op, sim.params[op.weight], sim.encodings[op.weight])
    assert found == pytest.approx(spread(rounded - exact) / spread(exact), rel=1e-3)


def test_noise_of_values_is_that_of_rounding_them(net, bank):
    sim = QuantSim(net.model).apply("fold_batch_norm").calibrate(net.images)
    for tensor in sim.plan.activations:
        values, encoding = outputs(sim, net.images, tensor), sim.encodings[tensor]
        lost = np.square(encoding.fake_quantize(values.astype(np.float32)) - values).sum()
        assert tensor_noise(bank, tensor, encoding) == pytest.approx(lost / np.square(values).sum(), rel=0.1)


def test_bits_are_spent_without_data(net, bank, monkeypatch):
    result = mixed_precision(net.model, bank, candidates=["int8/uint8", "int4/uint8"], budget=0.75, cost="weight_bytes",
                             solver="greedy")  # fmt: skip
    assert result.met
    assert set(result.assignment.values()) == {"int8 × uint8", "int4 × uint8"}
    assert any("predicted from the bank" in note for note in result.notes)
    by_group = {}
    for s in result.sensitivities:
        by_group.setdefault(s.group, {})[s.candidate] = s.sqnr_db
    assert all(v["int8 × uint8"] > v["int4 × uint8"] + 10 for v in by_group.values())
    assert result.sim.encodings


def test_a_search_solves_on_the_bank_and_evaluates_on_data(net, bank):
    found = auto_quantize(
        net.model, bank, net.data, allowed_drop=0.0, weights="int4", schemes=["sqnr"],
        techniques="fold_batch_norm,gptq",
    )  # fmt: skip
    tried = {t.name: t for t in found.trials}
    assert any("gptq" in name and t.score is not None for name, t in tried.items()), tried


def test_the_commands(net, bank, run, tmp_path):
    common = [net.model, "--bank", bank.path]
    done = run("mixed-precision", *common, "--candidates", "int8/uint8,int4/uint8", "--budget", "0.75", "--solver",
               "greedy", "--cost", "weight_bytes", "--out", tmp_path / "mixed", "-q")  # fmt: skip
    assert done.status == 0, done.err
    assert "predicted from the bank" in done.out
    done = run(
        "analyze", *common, "--weights", "int4", "--recipe", "fold_batch_norm", "--out", tmp_path / "layers", "-q"
    )
    assert done.status == 0, done.err
    layers = json.loads((tmp_path / "layers/layers.json").read_text())
    assert {row["layer"] for row in layers} == {"stem", "dw", "mix", "res", "fc"}
    assert layers == sorted(layers, key=lambda row: row["weights_db"])
    assert all(10 < row["weights_db"] < 35 < row["inputs_db"] < 60 for row in layers)
    done = run("auto", *common, "--labels", "labels.npy", "--allowed-drop", "0.1", "--out", tmp_path / "auto", "-q")
    assert done.status == 2
    assert "give --evaluation-data" in done.err
    done = run("auto", net.model, "--labels", "labels.npy", "--allowed-drop", "0.1", "--out", tmp_path / "auto", "-q",
               "--evaluation-data", "x.npy")  # fmt: skip
    assert done.status == 2
    assert "give either --data or --bank" in done.err


def test_rounding_on_a_bank_is_remembered_in_a_saved_state(net, bank, tmp_path):
    sim = QuantSim(net.model, weights="int4").apply("fold_batch_norm").apply("gptq", bank)
    sim.save(tmp_path / "saved")
    loaded = QuantSim.load(tmp_path / "saved").calibrate(Bank.open(bank.path))
    assert loaded.plan.activations[0] in loaded.encodings
    with pytest.raises(InputError, match="another network"):
        QuantSim.load(tmp_path / "saved", sim.native).calibrate(bank)
