"""`QuantSim.measure` on each framework: agreement with the float network, and what it asks for after techniques."""

from __future__ import annotations

import json

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright import QuantSim
from bitwright.bank import collect
from bitwright.errors import InputError
from bitwright.progress import Silent
from bitwright.testing import models
from bitwright.testing.builder import Builder

pytestmark = pytest.mark.parametrize("port", FRAMEWORKS.values(), ids=FRAMEWORKS)


def logits():
    """`models.mlp` without its softmax."""
    b = Builder(0)
    x = b.relu("act1", b.linear("fc1", b.input("x", 10), 16))
    x = b.relu("act2", b.linear("fc2", x, 12, bias=False))
    return b.build(b.linear("fc3", x, 4))


MODEL = logits()


def divergence(p, q):
    """Of logits, in nats."""
    p, q = (x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(-1).mean()


def test_against_float(port):
    data = port.batch(models.batch(MODEL, 20, 1))
    sim = port.sim(MODEL, weights="int4").calibrate(data)
    found = sim.measure(data, "kl", "agreement", "top1", labels=np.zeros(20, int))
    p, q = (sim.predict(data, simulated=s)[0] for s in (False, True))
    assert found["kl"].simulated == pytest.approx(divergence(p, q), rel=1e-4)
    assert found["kl"].simulated > 1e-5
    assert (found["kl"].float_model, found["kl"].count) == (None, 20)
    assert found["agreement"].simulated == (p.argmax(-1) == q.argmax(-1)).mean()
    assert (found["top1"].float_model, found["top1"].simulated) == (
        (p.argmax(-1) == 0).mean(),
        (q.argmax(-1) == 0).mean(),
    )


def test_it_shows_how_far_it_is(port):
    shown = []

    class Shown(Silent):
        def start(self, description, total):
            shown.append((description, total))

        def advance(self, steps=1, note=""):
            shown.append(steps)

    data = port.batch(models.batch(MODEL, 20, 1))
    sim = port.sim(MODEL).calibrate(data)
    sim.attach(progress=Shown())
    sim.measure(data, "kl", "agreement")
    assert shown[0] == ("Measuring kl, agreement", 20) and sum(shown[1:]) == 20


def test_techniques_need_the_model_as_it_was(port):
    data = port.batch(models.batch(MODEL, 20, 1))
    sim = port.sim(MODEL, weights="int4")
    before = sim.fork()
    p = port.sim(MODEL).calibrate(data).predict(data, simulated=False)[0]
    sim.apply("gptq", data, candidates=4).calibrate(data)
    with pytest.raises(InputError, match="'gptq' has changed the float model"):
        sim.measure(data, "kl")
    found = sim.measure(data, "kl", reference=before)["kl"].simulated
    assert found == pytest.approx(divergence(p, sim.predict(data)[0]), rel=1e-4)


def test_scales_alone_leave_the_float_model_as_it_was(port, tmp_path):
    data = port.batch(models.batch(MODEL, 20, 1))
    sim = port.sim(MODEL, weights="int4")
    sim.apply("seq_mse", data).apply("weight_clipping", data).calibrate(data)
    assert sim.changed_by == ()
    found = sim.measure(data, "kl")["kl"].simulated
    p, q = (sim.predict(data, simulated=s)[0] for s in (False, True))
    assert found == pytest.approx(divergence(p, q), rel=1e-4)


def test_a_saved_simulation_knows_what_has_changed_it(port, tmp_path):
    data = port.batch(models.batch(MODEL, 20, 1))
    sim = port.sim(MODEL, weights="int4")
    before = sim.fork()
    sim.apply("gptq", data, candidates=4).calibrate(data)
    again = QuantSim.load(sim.save(tmp_path / "saved"))
    with pytest.raises(InputError, match="'gptq' has changed the float model"):
        again.measure(data, "kl")
    wanted = sim.measure(data, "kl", reference=before)["kl"].simulated
    assert again.measure(data, "kl", reference=port.sim(MODEL))["kl"].simulated == pytest.approx(wanted, rel=1e-5)


def test_states_saved_before_changes_were_noted_take_techniques_for_such(port, tmp_path):
    data = port.batch(models.batch(MODEL, 20, 1))
    folder = port.sim(MODEL, weights="int4").apply("gptq", data, candidates=4).calibrate(data).save(tmp_path / "saved")
    file = folder / "quantsim.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in content.items() if k not in ("changed_by", "seal")}))
    assert QuantSim.load(folder).changed_by == ("gptq",)


def test_ranges_from_a_bank_leave_the_float_model_as_it_was(port, tmp_path):
    data = port.batch(models.batch(MODEL, 20, 1))
    sim = port.sim(MODEL)
    sim.calibrate(collect(sim, data, tmp_path / "bank"))
    assert sim.measure(data, "kl")["kl"].simulated > 0


def test_bad_requests(port):
    data = port.batch(models.batch(MODEL, 6, 1))
    sim = port.sim(MODEL).calibrate(data)
    for names, options, message in (
        ((), {}, "name a metric"),
        (("kl", "kl"), {}, "named twice"),
        (("kl",), {"output": "nothing"}, "no tensor 'nothing'"),
        (("perplexity",), {}, r"logits \(samples, length, vocabulary\)"),
    ):
        with pytest.raises(InputError, match=message):
            sim.measure(data, *names, **options)
