"""Metrics: right values on hand-made logits, what is masked, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bitwright.backend import Feed
from bitwright.data import labels as read_labels
from bitwright.data import labels_of, open_data
from bitwright.errors import InputError
from bitwright.metrics import metric_factory, token_input

LOG = np.log


def logits(probabilities):
    return np.log(np.asarray(probabilities, np.float32)) + 3  # a softmax doesn't see what is added to all


def metric(name, *batches, labels=None):
    """(value, count) over batches of (inputs, outputs, reference)."""
    found = metric_factory(name, labels)()
    for inputs, outputs, reference in batches:
        found.add(inputs, outputs, reference)
    return found.value(), found.count


P = [[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.3, 0.5]]]
IDS = np.array([[2, 0, 1]])


def test_perplexity_is_of_the_next_token():
    # Position 0 predicts token 0 (p = 0.5), position 1 token 1 (p = 0.1); the last position predicts nothing known.
    value, count = metric("perplexity", ({"ids": IDS}, logits(P), None))
    assert value == pytest.approx(np.exp(-(LOG(0.5) + LOG(0.1)) / 2), rel=1e-6)
    assert count == 2


def test_batches_count_by_their_positions():
    long = np.tile(IDS, (3, 1)), np.tile(logits(P), (3, 1, 1))
    one = metric("perplexity", ({"ids": IDS}, logits(P), None), ({"ids": long[0]}, long[1], None))
    assert one == (pytest.approx(np.exp(-(LOG(0.5) + LOG(0.1)) / 2), rel=1e-6), 8)


def test_masked_positions_do_not_count():
    inputs = {"ids": IDS, "attention_mask": np.array([[1, 1, 0]])}
    value, count = metric("perplexity", (inputs, logits(P), None))
    assert (value, count) == (pytest.approx(2.0, rel=1e-6), 1)
    other = logits([[[0.25, 0.25, 0.5], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]])
    value, count = metric("kl", (inputs, other, logits(P)))
    assert (value, count) == (pytest.approx((0.5 * LOG(2) + 0.25 * LOG(0.5)) / 2, rel=1e-6), 2)
    assert metric("agreement", (inputs, other, logits(P))) == (0.5, 2)
    with pytest.raises(InputError, match="every position is masked"):
        metric("kl", ({"mask": np.zeros((1, 3), int)}, other, logits(P)))


def test_divergence_holds_zero_probabilities_and_large_vocabularies(monkeypatch):
    p = logits([[[0.5, 0.5, 1.0]]])
    p[0, 0, 2] = -1e4  # its probability is 0, and p ln p as well
    value, _ = metric("kl", ({}, logits([[[0.25, 0.25, 0.5]]]), p))
    assert value == pytest.approx(LOG(2), rel=1e-6)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 7, 50)).astype(np.float32)
    whole = metric("kl", ({}, a, b))
    monkeypatch.setattr("bitwright.metrics._metrics._ELEMENTS", 150)
    assert metric("kl", ({}, a, b)) == (pytest.approx(whole[0], rel=1e-12), 14)
    assert metric("kl", ({}, a, a))[0] == 0
    assert metric("kl", ({}, a[:, 0], b[:, 0]))[1] == 2  # a classifier's (samples, classes)


def test_top1_needs_a_label_for_each_sample():
    outputs = np.eye(3, dtype=np.float32)
    assert metric("top1", ({}, outputs, None), labels=[0, 1, 1]) == (pytest.approx(2 / 3), 3)
    with pytest.raises(InputError, match="more samples"):
        metric("top1", ({}, outputs, None), labels=[0])
    with pytest.raises(InputError, match="4 labels for 3 samples"):
        metric("top1", ({}, outputs, None), labels=[0, 1, 2, 0])
    with pytest.raises(InputError, match="needs labels"):
        metric_factory("top1")


def test_tokens_are_found_or_asked_for():
    ids, shape = np.zeros((2, 5), np.int64), (2, 5)
    assert token_input({"a": ids, "x": np.zeros((2, 5), np.float32), "b": ids[:, :3]}, shape) == "a"
    assert token_input({"input_ids": ids, "attention_mask": ids, "position_ids": ids}, shape) == "input_ids"
    with pytest.raises(InputError, match=r"'a' and 'b' have the logits' shape \(2, 5\); name the tokens"):
        token_input({"a": ids, "b": ids}, shape)
    with pytest.raises(InputError, match="no integer input"):
        token_input({"x": np.zeros(shape, np.float32)}, shape)
    two = {"a": IDS, "b": np.zeros_like(IDS)}
    assert metric("perplexity:a", (two, logits(P), None)) == metric("perplexity", ({"a": IDS}, logits(P), None))


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "message"),
    [
        ("perplexity", {"ids": IDS}, np.zeros((3, 4)), "logits \\(samples, length, vocabulary\\)"),
        ("perplexity", {"ids": IDS + 1}, logits(P), "token ids from 1 to 3, of 3 logits"),
        ("perplexity:y", {"y": IDS[:, :2]}, logits(P), "tokens are int64"),
        ("perplexity", {"ids": IDS}, np.full((1, 3, 3), np.nan), "NaN"),
        ("kl", {}, np.full((1, 3, 3), np.inf), "NaN or infinity"),
        ("agreement", {}, np.full((1, 3, 3), np.nan), "NaN"),
    ],
)
def test_what_cannot_be_measured_is_refused(name, inputs, outputs, message):
    with pytest.raises(InputError, match=message):
        metric(name, (inputs, outputs, logits(P)))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("name", ["kl", "perplexity"])
def test_probabilities_are_no_logits(name, rows):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, rows, 5)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    inputs = {"ids": np.zeros((1, rows), np.int64)}
    with pytest.raises(InputError, match=f"{name}: the outputs are probabilities.*ahead of the softmax"):
        metric(name, (inputs, p, p))
    for reference in (np.log(p), p * 1.5, p - 0.3):
        assert metric(name, (inputs, reference, reference))[1] > 0
    # One batch whose logits look like some is none among others.
    few = {"ids": np.zeros((1, 2), np.int64)}
    assert metric(name, (few, p[:, :2], p[:, :2]), (few, logits[:, :2], logits[:, :2]))[1] > 0


@pytest.mark.parametrize("name", ["kl", "perplexity", "agreement", "top1"])
def test_one_class_says_nothing(name):
    one = np.random.default_rng(0).normal(size=(2, 1) if name == "top1" else (2, 4, 1))
    with pytest.raises(InputError, match="one class"):
        metric(name, ({"ids": np.zeros((2, 4), np.int64)}, one, one), labels=[0, 0])


@pytest.mark.parametrize("labels", [np.eye(3), [0, 1, -1], [0.0, 1.5, 2.0], ["a", "b", "c"]])
def test_top1_refuses_what_are_no_class_indices(labels):
    with pytest.raises(InputError, match="class indices"):
        metric("top1", ({}, np.eye(3), None), labels=labels)


def test_top1_refuses_labels_that_the_outputs_have_no_class_for():
    with pytest.raises(InputError, match="a label is 3, of outputs with the classes 0 to 2"):
        metric("top1", ({}, np.eye(3), None), labels=[0, 1, 3])


@pytest.mark.parametrize("name", ["ppl", "kl:x"])
def test_unknown_metrics(name):
    with pytest.raises(InputError, match="metric"):
        metric_factory(name)


# -- outputs without an axis of classes behind that of samples


@pytest.mark.parametrize("shape", [(), (5,)])
@pytest.mark.parametrize("name", ["kl", "perplexity", "agreement", "top1"])
def test_outputs_without_classes_are_refused(name, shape):
    """Over (samples,) the last axis is samples: what was compared were samples with one another."""
    one = np.random.default_rng(0).normal(size=shape)
    with pytest.raises(InputError, match=rf"{name}: the output has shape {re.escape(str(shape))}.*\(samples, "):
        metric(name, ({"ids": np.zeros(5, np.int64)}, one, one), labels=[0] * 5)


@pytest.mark.parametrize("name", ["kl", "agreement", "top1"])
def test_strings_are_refused(name):
    with pytest.raises(InputError, match="takes numbers"):
        metric(name, ({}, np.array([["a", "b"]]), np.array([["a", "b"]])), labels=[0])


def test_a_whole_feed_is_one_sample():
    feed = Feed({"x": np.zeros(4, np.float32)})
    a, b = np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.0])
    assert metric("agreement", (feed, a, a), (feed, a, b)) == (0.5, 2)
    assert metric("kl", (feed, a, b)) == metric("kl", ({}, a[None], b[None]))
    assert metric("top1", (feed, a, None), (feed, b, None), labels=[2, 2]) == (0.5, 2)
    with pytest.raises(InputError, match="shape \\(\\)"):
        metric("agreement", (feed, a[0], a[0]))
    # Time first: the positions of one feed, of which masked ones don't count, aren't samples of their own.
    steps = np.stack([a, b, a, b])
    masked = Feed({"mask": np.array([1, 1, 1, 0])})
    for name in ("agreement", "kl"):
        found = metric_factory(name)()
        for _ in range(2):
            found.add(masked, steps, steps[::-1])
        assert (found.count, found.terms.counts) == (6, (3, 3))
        alike = metric_factory(name)()
        alike.add({"mask": np.array([[1, 1, 1, 0]])}, steps[None], steps[None, ::-1])
        assert found.value() == alike.value()
    rows = metric_factory("top1", [2, 1, 0, 0])()
    rows.add(feed, steps, None)
    assert (rows.value(), rows.terms.counts) == (0.5, (4,))


def test_perplexity_of_a_feed_needs_its_length_s_axis():
    ids = np.zeros((2, 3), np.int64)
    with pytest.raises(InputError, match="isn't known which axis is the text's length"):
        metric("perplexity", (Feed({"ids": ids}), np.zeros((2, 3, 4)), None))
    one = np.random.default_rng(0).normal(size=(1, 3, 4))
    assert metric("perplexity", (Feed({"ids": ids[:1]}), one, None)) == metric(
        "perplexity", ({"ids": ids[:1]}, one, None)
    )


def test_top1_takes_one_class_a_sample():
    maps = np.random.default_rng(0).normal(size=(2, 3, 4, 4))
    with pytest.raises(InputError, match="several axes behind the first"):
        metric("top1", ({}, maps, None), labels=[0, 1])
    one = maps[:, :, :1, :1]
    assert metric("top1", ({}, one, None), labels=one[:, :, 0, 0].argmax(1)) == (1.0, 2)
    assert metric("top1", ({}, one.transpose(0, 2, 3, 1), None), labels=one[:, :, 0, 0].argmax(1)) == (1.0, 2)


@pytest.mark.parametrize("labels", [[0, 1, 1], [0.0, 1.0, 1.0], [False, True, True], [[0], [1], [1]]])
def test_every_reader_of_labels_has_one_rule(labels, tmp_path):
    wanted = np.array([0, 1, 1])
    np.save(tmp_path / "l.npy", np.asarray(labels))
    assert np.array_equal(read_labels(tmp_path / "l.npy"), wanted)
    data = open_data(np.zeros((3, 2), np.float32), {"x": ((None, 2), "float32")})
    assert np.array_equal(labels_of(labels, data), wanted)
    assert metric("top1", ({}, np.eye(3), None), labels=labels) == (pytest.approx(2 / 3), 3)
