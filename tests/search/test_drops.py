"""Drops with margins: which networks are good enough when the drop must hold on other samples too."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bitwright import QuantSim, auto_quantize, mixed_precision
from bitwright.errors import InputError
from bitwright.metrics import Terms
from bitwright_search import auto_page
from bitwright_search.drops import Allowance, read_score, recorded
from bitwright_search.evaluation import ByMetric, Labelled, Score

HARD = {"target": "default_per_channel", "weights": "int4", "schemes": ["minmax"], "techniques": "bn_fold"}
ALLOWED = 0.0038


def score(*values):
    terms = Terms.single(values)
    return Score(terms.mean, terms)


def test_the_upper_bound_decides():
    reference, found = score(1.0, 1.0, 1.0, 1.0), score(0.9, 0.95, 1.0, 0.95)
    drop = Allowance(0.06).lost(reference, found)
    assert drop.value == pytest.approx(0.05)
    assert drop.margin == pytest.approx(2.353 * np.std([0, 0.05, 0.1, 0.05], ddof=1) / 2, rel=1e-3)
    assert Allowance(0.06).keeps(reference, found)
    assert not Allowance(0.06, 0.95).keeps(reference, found)
    assert Allowance(0.05 + drop.margin + 1e-9, 0.95).keeps(reference, found)
    assert Allowance(0.06, 0.95).keeps(Score(1.0), Score(0.95)), "a number alone has no margin"


@pytest.mark.parametrize("evaluate", [Labelled(None, None), ByMetric(None, "agreement")])
def test_points_that_are_taken_for_shares_are_refused(evaluate):
    with pytest.raises(InputError, match=r"500 points .*: a point is 0\.01, 5 points are 0\.05"):
        Allowance.of(5, None, evaluate)
    assert Allowance.of(0.99, None, evaluate).drop == 0.99
    assert Allowance.of(5, None, ByMetric(None, "kl")).drop == 5


def test_functions_that_seem_to_give_shares_are_warned_of():
    with pytest.warns(UserWarning, match="scores 0.72, and the allowed drop is 5"):
        Allowance.of(5, None, len).check(Score(0.72))
    Allowance.of(5, None, len).check(Score(72.0))  # and not where it is one of 72 points
    Allowance.of(0.05, None, len).check(Score(0.72))


def test_what_the_default_is():
    assert Allowance.of(0.1, None, ByMetric(None, "perplexity:ids")).confidence == 0.95
    assert Allowance.of(0.1, None, ByMetric(None, "kl")).confidence == 0.95
    for other in (ByMetric(None, "agreement"), Labelled(None, None), len, None):
        assert Allowance.of(0.1, None, other).confidence is None
    assert Allowance.of(0.1, 0.5, ByMetric(None, "kl")).confidence is None
    assert Allowance.of(0.1, 0.9, len).confidence == 0.9
    for wrong in (0.4, 1.0, 95):
        with pytest.raises(InputError, match="confidence"):
            Allowance.of(0.1, wrong, len)


def test_shares_that_no_sample_changes_need_samples():
    """Ten right answers that stay right don't tell that a hundredth is kept; 300 do."""
    few, many = score(*[1.0] * 10), score(*[1.0] * 300)
    sure = Allowance.of(0.01, 0.95, len)
    assert not sure.keeps(few, few)
    assert sure.keeps(many, many)
    assert Allowance.of(0.01, None, len).keeps(few, few)


def test_a_margin_that_was_asked_for_is_never_left_out():
    """A function that gives an array for one network and a number for another."""
    with pytest.raises(InputError, match=r"confidence=0\.9"):
        Allowance.of(0.06, 0.9, len).keeps(score(1.0, 0.5), Score(0.75))


def test_scores_come_back_from_files():
    for given in (Score(0.5), score(0.25, 0.75), score(0.0, 1.0)):
        assert read_score(json.loads(json.dumps(recorded(given)))) == given


@pytest.fixture(scope="module")
def by(net):
    """Results by confidence, with the margin of kl."""
    return {
        c: auto_quantize(net.model, net.images, ByMetric(net.images, "kl"), allowed_drop=ALLOWED, confidence=c, **HARD)
        for c in (None, 0.5)
    }  # fmt: skip


def test_more_is_spent_until_the_bound_is_within(by, net):
    sure, mean = by[None], by[0.5]
    assert sure.met
    assert mean.met
    assert (sure.confidence, mean.confidence) == (0.95, None)
    assert len(sure.wider) > len(mean.wider)
    assert sure.drop + sure.margin <= ALLOWED < mean.drop + mean.margin
    # It is the margin of the samples' own divergences.
    sim, before = sure.sim, QuantSim(net.model, target=HARD["target"], weights="int4")
    figure = sim.measure(net.images, "kl", reference=before)["kl"]
    assert sure.drop == pytest.approx(figure.simulated, rel=1e-6)
    assert sure.margin == pytest.approx(1.669 * figure.error, rel=1e-3)  # 63 degrees of freedom
    # A network whose drop alone was within, and that wasn't taken.
    assert any(t.kind == "types" and -t.score <= ALLOWED < -t.score + t.margin for t in sure.trials)


def test_margins_are_told(by):
    assert f"a drop of {by[None].drop:.4g} ± {by[None].margin:.4g} is within" in str(by[None])
    assert json.loads(by[None].to_json())["margin"] == by[None].margin
    assert "with a confidence of 0.95" in auto_page.render(by[None], "title")
    assert any("other samples" in line and "confidence=0.95" in line for line in by[0.5].advice)
    assert not any("other samples" in line for line in by[None].advice)


def test_too_few_samples_are_said(net):
    options = {"wider": False, **HARD}
    few = auto_quantize(net.model, net.images, ByMetric(net.images[:3], "kl"), allowed_drop=0.07, **options)
    assert few.drop < 0.07 < few.drop + few.margin
    assert not few.met
    assert any("four times as many halve" in line for line in few.advice)
    one = auto_quantize(net.model, net.images, ByMetric(net.images[:1], "kl"), allowed_drop=1.0, **options)
    assert one.met
    assert (one.margin, one.confidence) == (None, None), "it was judged by the drop alone"
    assert any("one sample" in line for line in one.advice)


def test_functions_may_give_a_score_for_each_sample(net):
    def right(model):
        return (model({"image": net.images})["scores"].argmax(axis=1) == net.labels).astype(np.float32)

    options = {"allowed_drop": 0.2, "confidence": 0.9, **HARD}
    one = auto_quantize(net.model, net.images, right, **options)
    other = auto_quantize(net.model, net.images, net.data, **options)
    assert [(t.name, t.score, t.margin) for t in one.trials] == [(t.name, t.score, t.margin) for t in other.trials]
    assert one.margin > 0
    with pytest.raises(InputError, match="array with a score for each sample"):
        auto_quantize(net.model, net.images, net.fidelity, **options)
    with pytest.raises(InputError, match="numpy array with a score"):
        auto_quantize(net.model, net.images, lambda model: [0.5, 0.5], allowed_drop=0.2, **HARD)


def test_margins_are_those_of_the_run_before(net, tmp_path):
    options = {"allowed_drop": ALLOWED, "run": tmp_path / "run", **HARD}
    first, again = (auto_quantize(net.model, net.images, ByMetric(net.images, "kl"), **options) for _ in range(2))
    assert [(t.name, t.score, t.margin, t.seconds) for t in first.trials] == [
        (t.name, t.score, t.margin, t.seconds) for t in again.trials
    ]


def test_mixed_precision_judges_so_too(net):
    def found(allowed, confidence):
        return mixed_precision(net.model, net.images, ByMetric(net.images, "kl"), allowed_drop=allowed,
                               confidence=confidence, candidates=["int8/uint8", "int4/uint8"],
                               solver="greedy")  # fmt: skip

    first = found(0.1, 0.5)
    allowed = -first.score + first.margin / 2
    mean, sure = found(allowed, 0.5), found(allowed, None)
    assert mean.met
    assert sure.met
    assert mean.assignment == first.assignment
    assert -sure.score + sure.margin <= allowed
    assert sure.cost > mean.cost
    one = mixed_precision(net.model, net.images, ByMetric(net.images[:1], "kl"), allowed_drop=1.0,
                          candidates=["int8/uint8", "int4/uint8"], solver="greedy")  # fmt: skip
    assert (one.met, one.margin, one.confidence) == (True, None, None)
    assert any("one sample" in note for note in one.notes)
    with pytest.raises(InputError, match=r"confidence=0\.9"):
        mixed_precision(net.model, net.images, net.fidelity, confidence=0.9, allowed_drop=0.1,
                        candidates=["int8/uint8", "int4/uint8"], solver="greedy")  # fmt: skip
