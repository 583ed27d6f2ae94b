"""How sure means are: Student's quantiles, standard errors of paired differences, and that bounds hold."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.errors import InputError
from bitwright.metrics import Terms, metric_factory, student


def test_quantiles_are_those_of_the_tables():
    """One-sided, from Student's t tables (NIST/SEMATECH, 1.3.6.7.2)."""
    for probability, freedom, value in (
        (0.9, 1, 3.078), (0.95, 1, 6.314), (0.95, 2, 2.920), (0.95, 7, 1.895), (0.975, 10, 2.228), (0.99, 30, 2.457),
        (0.999, 5, 5.893), (0.95, 100, 1.660), (0.975, 10**6, 1.960),
    ):  # fmt: skip
        assert student(probability, freedom) == pytest.approx(value, abs=6e-4)
    assert student(0.5, 3) == 0
    for probability, freedom in ((0.4, 3), (1.0, 3), (0.9, 0)):
        with pytest.raises(InputError, match="Student"):
            student(probability, freedom)


def test_samples_of_one_size_have_the_usual_standard_error():
    values = np.random.default_rng(0).normal(size=20)
    terms = Terms.single(values)
    assert terms.mean == pytest.approx(values.mean())
    assert terms.error == pytest.approx(values.std(ddof=1) / np.sqrt(20))
    assert terms.margin(0.95) == pytest.approx(1.729 * terms.error, rel=1e-3)
    assert terms.margin(0.5) == 0
    assert Terms.single([1.0]).error is None
    assert Terms((3.0, 0.0), (2, 0)).error is None, "a sample that is masked altogether doesn't count"


def test_longer_samples_count_for_more():
    """By the definition, with a mean of 2: residuals 2, -2 and 0 of 2, 4 and 1 positions."""
    terms = Terms((6.0, 6.0, 2.0), (2, 4, 1))
    assert terms.mean == 2.0
    assert terms.error == pytest.approx(np.sqrt(3 / 2 * (4 + 4)) / 7)


def test_what_both_have_in_common_cancels():
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 5, 12)
    one, other = Terms.single(hard), Terms.single(hard - 1 + rng.normal(0, 0.1, 12))
    assert (one - other).error < 0.1 < one.error
    assert (one - other).mean == pytest.approx(1, abs=0.1)
    with pytest.raises(InputError, match="same data"):
        one - Terms.single(hard[:6])


def test_bounds_hold_as_often_as_they_say():
    """Samples of several sizes, whose positions have much in common: the bound that takes positions as independent
    would hold in a good half of the cases."""
    rng = np.random.default_rng(2)
    held, runs = 0, 2000
    for _ in range(runs):
        counts = rng.integers(50, 150, 8)
        sums = counts * (0.05 + rng.normal(0, 0.03, 8)) + rng.normal(0, 0.1, 8) * np.sqrt(counts)
        terms = Terms(tuple(sums), tuple(map(int, counts)))
        held += terms.mean + terms.margin(0.95) >= 0.05
    assert 0.93 < held / runs < 0.97


def test_metrics_tell_what_each_sample_has():
    rng = np.random.default_rng(3)
    found, wanted = rng.normal(size=(2, 5, 6, 9)).astype(np.float32)
    ids, mask = rng.integers(0, 9, (5, 6)), np.ones((5, 6), int)
    mask[1, 3:] = 0
    mask[4] = 0
    for name in ("perplexity", "kl", "agreement"):
        whole = metric_factory(name)()
        for part in (slice(0, 2), slice(2, 5)):
            whole.add({"ids": ids[part], "mask": mask[part]}, found[part], wanted[part])
        assert whole.terms.samples == 4
        assert sum(whole.terms.counts) == whole.count
        assert whole.value() == pytest.approx(np.exp(whole.terms.mean) if name == "perplexity" else whole.terms.mean)
        for sample in range(4):
            alone = metric_factory(name)()
            alone.add({"ids": ids[[sample]], "mask": mask[[sample]]}, found[[sample]], wanted[[sample]])
            assert alone.terms.counts == (whole.terms.counts[sample],)
            assert alone.terms.sums[0] == pytest.approx(whole.terms.sums[sample])
    top1 = metric_factory("top1", [1, 1, 0])()
    top1.add({}, np.eye(3)[[1, 0]], None)
    top1.add({}, np.eye(3)[[0]], None)
    assert top1.terms == Terms((1.0, 0.0, 1.0), (1, 1, 1), shares=True)


def test_shares_of_which_few_change_have_bounds_that_hold():
    """Student's t takes samples of which none changes for certain: of 50 its bound holds in 77 % of these cases."""
    rng = np.random.default_rng(4)
    for samples, lost, gained in (
        (10, 0.03, 0.0),
        (50, 0.03, 0.0),
        (50, 0.03, 0.02),
        (200, 0.03, 0.0),
        (200, 0.2, 0.1),
    ):
        held, runs = 0, 600
        for _ in range(runs):
            kind = rng.choice(3, samples, p=[lost, gained, 1 - lost - gained])
            before = Terms.single(np.where(kind == 1, 0.0, 1.0))
            terms = before - Terms.single(np.where(kind == 0, 0.0, 1.0))
            held += terms.mean + terms.margin(0.95) >= lost - gained - 1e-12
        assert held / runs > 0.92, (samples, lost, gained)


def test_the_bound_of_shares_is_wilsons_where_nothing_is_gained():
    """Wilson 1927, by its formula; and with none changed z² / (n + z²)."""
    z = 1.6448536
    for n, lost in ((20, 0), (20, 3), (100, 1), (8, 8)):
        terms = Terms.single([1.0] * n) - Terms.single([0.0] * lost + [1.0] * (n - lost))
        p = lost / n
        centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        assert terms.mean + terms.margin(0.95) == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-6)
        assert terms.margin(0.5) == 0
    same = Terms((5.0, 7.0), (8, 8), shares=True)
    assert (same - same).margin(0.95) == pytest.approx(z * z / (16 + z * z), abs=1e-6), "positions at the most"
    assert (Terms((0.0, 0.0), (8, 8)) - Terms((0.0, 0.0), (8, 8))).margin(0.95) == 0, "nats, not shares"
