"""Divergence predicted by gradients: what the definition gives, close to what is measured, and what it refuses."""

from __future__ import annotations

import json
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bitwright import QuantSim, RunDirectory, mixed_precision  # noqa: E402
from bitwright.bank import collect  # noqa: E402
from bitwright.errors import CapabilityError, InputError  # noqa: E402
from bitwright.statistics import LayerMoments  # noqa: E402
from bitwright_search import fisher  # noqa: E402
from bitwright_search.candidates import group_sites, read_candidates  # noqa: E402
from bitwright_search.evaluation import ByMetric  # noqa: E402
from bitwright_search.fisher import predicted_divergence  # noqa: E402
from bitwright_search.sensitivity import first_samples  # noqa: E402

BITS = ["int8/float", "int4/float", "int3/float"]


class Language(torch.nn.Module):
    """Token ids → logits; embedding and head are one matrix if tied."""

    def __init__(self, tied=False, vocabulary=40, width=24):
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.mix, self.up = torch.nn.Linear(width, width), torch.nn.Linear(width, 3 * width)
        self.down, self.head = torch.nn.Linear(3 * width, width), torch.nn.Linear(width, vocabulary, bias=False)
        for layer in (self.mix, self.up, self.down):
            layer.weight.data *= 1.5
        self.head.weight.data *= 6
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids, mask=None):
        x = self.embed(ids)
        x = x + torch.tanh(self.mix(x))
        return self.head(x + self.down(torch.relu(self.up(x))))


IDS = np.random.default_rng(0).integers(0, 40, (32, 16))


def opened(**options):
    torch.manual_seed(0)
    net = Language(**options).eval()
    return QuantSim(net, {"ids": torch.from_numpy(IDS[:2])}, activations="float", target="default_per_channel")


def table(sim, bits, tmp_path, data=None, samples=64):
    choices = read_candidates(bits)
    groups, _ = group_sites(sim, choices)
    dataset = sim.open({"ids": IDS} if data is None else data)
    with RunDirectory(tmp_path / "run") as run:
        return groups, predicted_divergence(sim, groups, choices, dataset, first_samples(dataset, samples), run)


def alone(sim, weight, text):
    """Measured: the divergence with one weight rounded."""
    twin = sim.retyped({weight: text}).calibrate({"ids": IDS})
    twin.simulation.set({s: None for s in twin.plan.quantized if twin.plan.root(s) == s != weight})
    return -ByMetric({"ids": IDS}, "kl").opened(sim).score(twin, twin.simulation).value


def test_a_prediction_is_close_to_what_is_measured(tmp_path):
    sim = opened()
    groups, nats = table(sim, BITS, tmp_path)
    assert [g.name for g in groups] == ["mix", "up", "down", "head"]
    measured = [[alone(sim, g.weights[0], t) for t in ("int8", "int4", "int3")] for g in groups]
    ratio = nats / np.array(measured)
    assert ((ratio > 0.6) & (ratio < 1.6)).all(), ratio
    assert abs(np.log(ratio)).mean() < 0.25
    places, others = (np.argsort(np.argsort(np.ravel(v))) for v in (nats, measured))
    assert np.corrcoef(places, others)[0, 1] > 0.95


def test_the_last_layer_has_what_the_definition_gives(tmp_path):
    """Of logits W x the gradient of a row at a label y is (p − [y]) x, with a mean square of p (1 − p) x²."""
    sim = opened()
    groups, nats = table(sim, BITS[:2], tmp_path)
    weight = groups[-1].weights[0]
    twin = sim.retyped({weight: "int4"}).calibrate({"ids": IDS})
    exact = np.asarray(sim.params[weight], np.float64)
    delta = twin.encodings[weight].fake_quantize(sim.params[weight].astype(np.float32)) - exact
    net, seen = sim.native, {}
    hook = sim.graph.op(groups[-1].ops[0]).data_inputs[0]
    from bitwright.backend import Tap

    session = sim.backend.session(net, [Tap(hook), Tap(sim.graph.outputs[0])])
    seen = session.run({"ids": IDS})
    x = np.asarray(seen[Tap(hook)], np.float64).reshape(-1, exact.shape[1])
    logits = np.asarray(seen[Tap(sim.graph.outputs[0])], np.float64).reshape(len(x), -1)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    moments = x.T @ x / len(x)
    matter = np.einsum("tr,tk->r", p * (1 - p), x**2) / len(x) / np.trace(moments)
    wanted = 0.5 * np.einsum("r,rk,kl,rl->", matter, delta, moments, delta)
    assert nats[-1, 1] == pytest.approx(wanted, rel=0.15)  # labels are drawn, one at each of 512 positions


def test_a_matrix_that_two_ops_read_goes_by_the_diagonal(tmp_path, monkeypatch):
    sim = opened(tied=True)
    weight = next(op.weight for op in sim.graph.linear_ops if len(sim.graph.users(op.weight)) == 2)
    groups, nats = table(sim, BITS[:2], tmp_path)
    place = next(i for i, g in enumerate(groups) if weight in g.weights)
    assert 0.4 < nats[place, 0] / alone(sim, weight, "int8") < 2.5
    # What moments add for the others: by the diagonal alone they have something else.
    monkeypatch.setattr(fisher, "_with_moments", lambda *given: None)
    _, diagonal = table(sim, BITS[:2], tmp_path / "diagonal")
    assert diagonal[place, 1] == nats[place, 1]
    others = [i for i in range(len(groups)) if i != place]
    assert (diagonal[others, 1] != nats[others, 1]).all()
    assert (abs(np.log(diagonal[others, 1] / nats[others, 1])) < 0.5).all()


def test_bits_are_spent_without_evaluation(tmp_path):
    sim = opened()
    by_budget = []
    for budget in (0.5, 0.7):
        out = tmp_path / str(budget)
        found = mixed_precision(sim, {"ids": IDS}, ByMetric({"ids": IDS}, "kl"), candidates=BITS, budget=budget,
                                cost="weight_bytes", sensitivities="fisher", solver="greedy", out=out)  # fmt: skip
        assert found.relative_cost <= budget
        assert found.predicted_kl == pytest.approx(-found.score, rel=0.5)
        assert found.predicted_kl == pytest.approx(
            sum(s.kl for s in found.sensitivities if found.assignment[s.group] == s.candidate)
        )
        assert f"predicted divergence {found.predicted_kl:.4g} nats" in str(found)
        assert json.loads((out / "mixed_precision.json").read_text())["predicted_kl"] == found.predicted_kl
        page = (out / "mixed_precision.html").read_text()
        assert "predicted divergence, nats" in page
        assert "high bars are sensitive" in page
        by_budget.append(found)
    assert by_budget[1].predicted_kl < by_budget[0].predicted_kl
    assert all(p.predicted_kl is not None and p.predicted_sqnr_db is None for p in by_budget[0].front)
    assert any("by the gradients" in note for note in by_budget[0].notes)


def test_it_is_taken_once(tmp_path, monkeypatch):
    sim = opened()
    _, first = table(sim, BITS, tmp_path)
    monkeypatch.setattr(fisher, "_table", None)
    assert (table(sim, BITS, tmp_path)[1] == first).all()


def test_large_networks_take_several_passes(tmp_path, monkeypatch):
    sim = opened()
    _, whole = table(sim, BITS, tmp_path)
    monkeypatch.setattr(fisher, "GRADIENT_BYTES", 4)
    _, parts = table(sim, BITS, tmp_path / "parts")
    assert parts == pytest.approx(whole, rel=1e-4)


def test_moments_of_one_pass_are_held_at_most(tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Counted(LayerMoments):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            alive.add(self)

        def update(self, *values):
            super().update(*values)
            most.append(len(alive))

    sim = opened()
    _, whole = table(sim, BITS, tmp_path)
    monkeypatch.setattr(fisher, "LayerMoments", Counted)
    monkeypatch.setattr(fisher, "MOMENTS_BYTES", 1)
    _, one_by_one = table(sim, BITS, tmp_path / "one by one")
    assert (one_by_one == whole).all()
    assert max(most) == 1


def test_probabilities_are_no_logits(tmp_path):
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5), torch.nn.Softmax(-1))
    rows = torch.randn(16, 8)
    sim = QuantSim(net.eval(), rows[:2], activations="float")
    with pytest.raises(InputError, match="without its last softmax"):
        table(sim, BITS, tmp_path, [rows])


def test_grouped_convolutions(tmp_path):
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, groups=4), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(128, 12),
    ).eval()  # fmt: skip
    net[-1].weight.data *= 20
    images = torch.randn(48, 3, 8, 8)
    sim = QuantSim(net, images[:2], activations="float", target="default_per_channel")
    found = mixed_precision(sim, [images], candidates=BITS[:2], budget=0.7, cost="weight_bytes", solver="greedy",
                            sensitivities="fisher")  # fmt: skip
    sizes = {s.group: s.kl for s in found.sensitivities if s.candidate == "int4 × float"}
    for group, nats in sizes.items():
        weight = sim.graph.op(group).weight
        twin = sim.retyped({weight: "int4"}).calibrate([images])
        twin.simulation.set({s: None for s in twin.plan.quantized if twin.plan.root(s) == s != weight})
        measured = -ByMetric([images], "kl").opened(sim).score(twin, twin.simulation).value
        assert 0.5 < nats / measured < 2, (group, nats, measured)


def test_what_it_can_not_do(net, tmp_path):
    sim = opened()
    options = {"budget": 0.8, "cost": "weight_bytes", "solver": "greedy", "sensitivities": "fisher"}
    with pytest.raises(CapabilityError, match="doesn't offer"):
        mixed_precision(net.model, net.images, candidates=["int8/uint8", "int4/uint8"], **options)
    with pytest.raises(InputError, match="weights alone"):
        mixed_precision(
            Language().eval(), {"ids": IDS}, sample={"ids": torch.from_numpy(IDS[:2])},
            candidates=["int8/uint16", "int4/uint8"], **options,
        )  # fmt: skip
    bank = collect(sim, {"ids": IDS}, tmp_path / "bank")
    with pytest.raises(InputError, match="no samples"):
        mixed_precision(sim, bank, candidates=BITS, **options)
    with pytest.raises(InputError, match="choose noise or fisher"):
        mixed_precision(sim, {"ids": IDS}, candidates=BITS, budget=0.8, sensitivities="hessian")
    with pytest.raises(InputError, match="for all candidates or none"):
        read_candidates(["int8/float", "int4/uint8"])
    with pytest.raises(InputError, match='activations="float"'):
        mixed_precision(QuantSim(sim.native), {"ids": IDS}, candidates=BITS, **options)
