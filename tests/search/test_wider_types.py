"""The last stage of auto_quantize: more bits at the sites that cost most, and at no more of them than it takes."""

from __future__ import annotations

import pytest

from bitwright import QuantSim, RunDirectory, auto_quantize
from bitwright.backend import Tap
from bitwright.bank import collect
from bitwright_search import widening
from bitwright_search.auto_result import Status
from bitwright_search.sensitivity import Silenced, first_samples, outputs_of
from bitwright_search.widening import measured, widenings

W4 = {"target": "per_tensor", "weights": "int4", "schemes": ["minmax"], "techniques": "bn_fold,cle"}
"""Weights cost more than activations; both cost."""


@pytest.fixture(scope="module")
def spent(net):
    return auto_quantize(net.model, net.images, net.fidelity, allowed_drop=0.04, **W4)


def types(result):
    return [t for t in result.trials if t.kind == "types"]


def test_no_more_sites_are_widened_than_it_takes(spent, net):
    assert spent.met
    scores = {int(t.name.split()[0]): t.score for t in types(spent)}
    count = len(spent.wider)
    assert 0 < count < max(scores)
    assert spent.score == scores[count] == net.fidelity(spent.model)
    assert spent.float_score - scores[count - 1] > 0.04, "one fewer isn't enough"
    assert spent.steps[-1] == f"{count} wider"


def test_what_was_spent_is_told_and_is_so(spent, net):
    for site, text in spent.wider.items():
        bits = spent.sim.plan.spec(site).bits
        assert (bits, text[-len(str(bits)) :]) == ((8, "8") if site in spent.sim.graph.params else (16, "16"))
    others = [s for s in spent.sim.plan.parameters if s not in spent.wider and s.endswith("weight")]
    assert all(spent.sim.plan.spec(s).bits == 4 for s in others)
    chosen = next(t for t in types(spent) if t.steps == spent.steps)
    weights = sum(s in spent.sim.graph.params for s in spent.wider)
    activations = len(spent.wider) - weights
    assert chosen.reason == f"{activations} of 8 activations with 16 bits, {weights} of 5 weights with 8 bits"
    # Pasted as overrides, it is the same plan.
    again = QuantSim(net.model, target="per_tensor", weights="int4", scheme="minmax", overrides=spent.wider)
    again.apply("fold_batch_norm")
    assert {s: again.plan.spec(s) for s in again.plan} == {s: spent.sim.plan.spec(s) for s in spent.sim.plan}


def test_weights_that_get_more_bits_are_rounded_anew(net):
    """A weight that AdaRound has rounded to 4 bits is the float one again, and rounded to 8."""
    result = auto_quantize(net.model, net.images, net.fidelity, allowed_drop=0.04,
                           **{**W4, "techniques": "bn_fold,cle,adaround"})  # fmt: skip
    assert "adaround" in result.steps
    weight = next(s for s in result.wider if s in result.sim.graph.params)
    codes = result.sim.encodings[weight].quantize(result.sim.params[weight])
    assert len(set(codes.ravel().tolist())) > 16


def silenced(net):
    """A network calibrated by extremes with everything in float, and its samples."""
    sim = QuantSim(net.model, target="per_tensor", scheme="minmax").apply("fold_batch_norm").calibrate(net.images)
    batches = first_samples(sim.open(net.images), 64)
    return sim, batches, Silenced.of(sim, batches, outputs_of(sim, batches))


def test_the_most_costly_come_first(net):
    sim, _, alone = silenced(net)
    noises = {w.root: alone.noise([w.root]) for w in widenings(sim)}
    result = auto_quantize(net.model, net.images, net.fidelity, allowed_drop=0.0, target="per_tensor",
                           schemes=["minmax"], techniques="bn_fold")  # fmt: skip
    assert list(result.wider) == sorted(noises, key=lambda s: -noises[s])


def test_many_sites_are_measured_by_classes(net, monkeypatch, tmp_path):
    """Of a class that isn't resolved, each site has the part that its own rounding error has."""
    sim, batches, alone = silenced(net)
    wider = [widening.Wider(w.root, w.text, w.sites, w.weight, ("all",)) for w in widenings(sim)]
    monkeypatch.setattr(widening, "FORWARDS", 2)
    with RunDirectory(tmp_path) as run:
        store = run.step("noise", {})
        found = measured(sim, wider, batches, store, store.path / "network")
    together = alone.noise([w.root for w in wider])
    assert sum(found.values()) == pytest.approx(together)

    def error(site):
        values = sim.backend.session(sim.native, [Tap(site)]).run({"image": net.images})[Tap(site)]
        return ((sim.table[site].fake_quantize(values) - values) ** 2).sum() / (values**2).sum()

    assert found["mix_out"] / found["res_out"] == pytest.approx(error("mix_out") / error("res_out"), rel=1e-4)


def test_on_request_nothing_is_spent(net):
    result = auto_quantize(net.model, net.images, net.fidelity, allowed_drop=0.04, wider=False, **W4)
    assert not result.met and not result.wider and not types(result)


def test_what_no_kernel_takes_is_left_as_it_is(net):
    """onnxruntime-cpu multiplies 8 bits by 8 bits only."""
    result = auto_quantize(net.model, net.images, net.fidelity, allowed_drop=0.0, target="onnxruntime-cpu",
                           schemes=["minmax"], techniques="bn_fold")  # fmt: skip
    sim = result.sim
    for op in sim.graph.linear_ops:
        assert sim.plan.spec(op.data_inputs[0]).bits == 8


def test_a_bank_takes_the_place_of_data(net, tmp_path, monkeypatch):
    bank = collect(QuantSim(net.model).apply("fold_batch_norm"), net.images, tmp_path / "bank")
    monkeypatch.setattr(widening, "noises_alone", None)
    result = auto_quantize(net.model, bank, net.fidelity, allowed_drop=0.75, target="per_tensor", weights="int4",
                           schemes=["minmax"], techniques="bn_fold")  # fmt: skip
    assert result.wider and result.met
    assert all(t.status in (Status.KEPT, Status.WORSE) for t in types(result))
