"""The metrics of `examples/evaluation` give what is worked out by hand here."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "evaluation"
detection, segmentation = (runpy.run_path(str(FOLDER / f"{name}.py")) for name in ("detection", "segmentation"))
Found = detection["Found"]


def found(*rows):
    """One image's detections: left, top, right, bottom, score, label."""
    table = np.array(rows, float).reshape(-1, 6)
    return Found(table[:, :4], table[:, 4], table[:, 5].astype(int))


def true(*rows):
    table = np.array(rows, float).reshape(-1, 5)
    return table[:, :4], table[:, 4].astype(int)


def test_overlaps():
    a, b = np.array([[0, 0, 2, 2], [5, 5, 5, 5]]), np.array([[1, 0, 3, 2], [0, 0, 2, 2], [4, 4, 6, 6]])
    np.testing.assert_allclose(detection["overlaps"](a, b), [[1 / 3, 1, 0], [0, 0, 0]], atol=1e-12)


def test_average_precision():
    """Right at 0.9, wrong at 0.8, right at 0.7, and a second box at 0.6 where one was found: 1/2 · 1 + 1/2 · 2/3."""
    truth = [true((0, 0, 4, 4, 1), (8, 8, 12, 12, 2)), true((0, 0, 4, 4, 1))]
    boxes = [
        found((0, 0, 4, 4, 0.7, 1), (0, 0, 4, 4, 0.6, 1), (8, 8, 12, 12, 0.8, 1)),
        found((0, 0, 4, 3, 0.9, 1)),
    ]
    ap = detection["average_precision"]
    assert ap(boxes, truth, 1, 0.5) == pytest.approx(5 / 6)
    # From 0.8 on the second image's box, which overlaps by 3/4, is wrong: wrong, wrong, right, wrong of two.
    assert ap(boxes, truth, 1, 0.8) == pytest.approx(1 / 2 * 1 / 3)
    assert ap(boxes, truth, 2, 0.5) == 0
    assert detection["mean_average_precision"](boxes, truth, (0.5, 0.8)) == pytest.approx((5 / 6 + 1 / 6) / 4)
    assert detection["mean_average_precision"]([found(), found()], truth) == 0


def test_of_two_that_overlap_the_better_one_is_kept():
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 3], [8, 8, 9, 9]], float)
    scores = np.array([[0.6, 0.3], [0.9, 0.2], [0.04, 0.7]])
    kept = detection["suppressed"](boxes, scores)
    assert kept.scores.tolist() == [0.9, 0.7, 0.3]
    assert kept.labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(kept.boxes, boxes[[1, 2, 0]])


def test_mean_iou():
    """Class 0: 2 of 3, class 1: 1 of 3, class 2: not there; a pixel that doesn't count."""
    masks, seen = np.array([[[0, 0], [1, 1]], [[0, 255], [1, 1]]]), np.array([[[0, 0], [1, 0]], [[0, 1], [0, 0]]])
    counts = np.zeros((0, 0), np.int64)
    for one, two in zip(seen, masks, strict=True):
        counts = segmentation["counted"](counts, one[None], two[None], 3)
    assert counts.tolist() == [[3, 0, 0], [3, 1, 0], [0, 0, 0]]
    assert segmentation["iou"](counts) == pytest.approx((3 / 6 + 1 / 4) / 2)
