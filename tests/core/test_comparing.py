"""One rule for captures of all frameworks: numpy stands for the framework, functions for models and their captures."""

import itertools

import numpy as np
import pytest

from bitwright.backend import Fault, compare_capture

FREE, FIXED = [((None, 3), "float32")], [((6, 3), "float32")]
X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


def twice(batch):
    return [2 * batch[0]]


class Framework:
    """A variable that calls count up, and a random generator, as frameworks keep them."""

    def __init__(self):
        self.count, self.state, self.moved = 0, 0, 0

    def restore(self):
        self.count, self.moved = 0, 0

    def drew(self):
        return self.moved > 0

    def counting(self, batch):
        self.count += 1
        return [batch[0] * self.count]

    def noisy(self, batch):
        self.state, self.moved = self.state + 1, self.moved + 1
        return [batch[0] + self.state]

    def unused(self, batch):
        self.noisy(batch)
        return twice(batch)


def python_state(calls, *factors):
    """A model whose calls multiply by these, one after another, the last one for good."""
    endless = itertools.chain(factors, itertools.repeat(factors[-1]))
    return lambda batch: [batch[0] * (calls.append(batch[0].shape) or next(endless))]


def found(model, capture, specs=FREE, sample=X, **options):
    finding = compare_capture(model, capture, specs, None if sample is None else [sample], **options)
    return None if finding is None else finding.fault


@pytest.mark.parametrize("specs", [FREE, FIXED])
@pytest.mark.parametrize("sample", [X, X[:1], None])
def test_a_capture_that_computes_the_same_is_right(specs, sample):
    assert found(twice, twice, specs, sample) is None


@pytest.mark.parametrize(
    ("capture", "told"),
    [
        (lambda b: [2.01 * b[0]], "output 'y' differs by up to"),
        (lambda b: [2 * b[0], b[0]], "2 outputs instead of 1"),
        (lambda b: [], "0 outputs instead of 1"),
        (lambda b: [2 * b[0][:, :2]], "output 'y' has shape [4, 2] instead of [4, 3]"),
        (lambda b: [(2 * b[0]).astype(np.float64)], "output 'y' is float64 instead of float32"),
        (lambda b: [np.full_like(b[0], np.nan)], "12 of them not finite"),
        (lambda b: [b[1]], "it fails where the model doesn't: list index out of range"),
    ],
)
def test_how_a_wrong_capture_differs_is_said(capture, told):
    finding = compare_capture(twice, capture, FREE, [X], names=["y"])
    assert finding.fault is Fault.DIFFERS and told in str(finding)


def test_types_that_are_less_exact_may_differ_by_more():
    assert found(twice, lambda b: [2.005 * b[0]]) is Fault.DIFFERS
    assert found(twice, lambda b: [2.005 * b[0]], dtypes=["float32", "bfloat16"]) is None


@pytest.mark.parametrize(
    "capture",
    [
        lambda b: [2 * b[0] if len(b[0]) > 1 else b[0]],
        lambda b: [np.broadcast_to(2 * b[0], (4, 3))],
        lambda b: [2 * b[0][:4].reshape(4, 3)],
    ],
    ids=["another way", "a size that is kept", "a size that is fixed"],
)
def test_a_capture_that_is_right_for_the_sample_s_size_alone_is_noticed(capture):
    assert found(twice, capture) is Fault.SIZE
    assert found(twice, capture, [((4, 3), "float32")], X[:4]) is None  # which is all that it says it takes


def test_one_sample_is_run_as_two_unless_the_model_is_large():
    alone = lambda b: [2 * b[0] if len(b[0]) == 1 else b[0]]
    assert found(twice, alone, sample=X[:1]) is Fault.SIZE
    assert found(twice, alone, sample=X[:1], size=2**30) is None


@pytest.mark.parametrize("specs", [FREE, FIXED])
def test_a_model_that_changes_is_told_from_a_wrong_capture(specs):
    calls = []
    assert found(python_state(calls, 2, 3), twice, specs) is Fault.CHANGES
    assert sum(np.prod(shape) for shape in calls) <= 2 * X.size  # what two passes over the sample would cost


def test_a_capture_that_counts_its_calls_as_the_model_does_is_noticed():
    assert found(python_state([], 2, 3, 4), python_state([], 2, 3, 4)) is Fault.CHANGES


def test_a_model_that_fails_when_it_is_called_again_changes():
    calls = []

    def once(batch):
        calls.append(batch)
        return twice(batch) if len(calls) == 1 else [batch[1]]

    assert found(once, twice, FIXED) is Fault.CHANGES


def test_a_model_that_takes_no_other_number_of_samples_is_asked_for_the_same_again():
    def picky(batch):
        if len(batch[0]) != 4:
            raise ValueError("four, please")
        return twice(batch)

    assert found(picky, twice) is None
    calls = []
    state = python_state(calls, 2, 3)
    assert found(lambda b: state(b) if picky(b) else [], twice) is Fault.CHANGES


def test_variables_are_put_back_before_each_run():
    held, copy = Framework(), Framework()

    def restore():
        held.restore(), copy.restore()

    assert found(held.counting, copy.counting, restore=restore) is None
    assert found(held.counting, copy.counting) is Fault.CHANGES


def test_random_numbers_are_told_where_results_depend_on_them():
    held = Framework()
    assert found(held.noisy, twice, restore=held.restore, drew=held.drew) is Fault.DRAWS
    assert found(held.unused, twice, restore=held.restore, drew=held.drew) is None
    assert found(held.unused, lambda b: b, restore=held.restore, drew=held.drew) is Fault.DIFFERS


def test_numbers_are_made_up_until_the_model_takes_them():
    def indices(batch):
        if not np.array_equal(batch[0], batch[0] > 0):
            raise IndexError("no such row")
        return [batch[0]]

    assert found(indices, lambda b: b, sample=None) is None
    assert found(indices, twice, sample=None) is Fault.DIFFERS
    finding = compare_capture(indices, twice, FREE, [X])
    assert finding.fault is Fault.UNCHECKED and str(finding).endswith("(no such row)")


@pytest.mark.parametrize("dtype", ["complex64", "bfloat16"])
def test_numbers_that_are_no_floats_of_numpy_may_be_rounded_too(dtype):
    kind = np.dtype(dtype) if dtype == "complex64" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    model = lambda batch: [(batch[0] * (1 + 1j if kind.kind == "c" else 1)).astype(kind)]
    rounded = lambda factor: lambda batch: [(model(batch)[0] * factor).astype(kind)]
    assert found(model, rounded(np.float32(1 + 3e-6 if kind.kind == "c" else 1.01)), dtypes=[dtype]) is None
    assert found(model, rounded(np.float32(-1)), dtypes=[dtype]) is Fault.DIFFERS


def test_a_sample_of_no_rows_is_no_obstacle():
    assert found(twice, twice, sample=X[:0]) is None


def test_fewer_samples_than_a_capture_takes_are_not_tried():
    another = lambda b: [2 * b[0] if len(b[0]) > 1 else b[0]]
    assert compare_capture(twice, another, FREE, [X]).fault is Fault.SIZE
    assert compare_capture(twice, another, FREE, [X], fewest=2) is None
    many = lambda b: [2 * b[0] if len(b[0]) > 5 else b[0]]
    assert compare_capture(twice, many, FREE, [np.tile(X, (4, 1))], fewest=6) is None


def test_rows_that_count_on_each_other_are_run_together():
    """Indices of rows beyond the first four."""
    rows = np.arange(6)[::-1].copy()
    specs = [((None, 3), "float32"), ((None,), "int64")]
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    gather = lambda b: [b[0][b[1]]]
    assert compare_capture(gather, gather, specs, [x, rows]) is None
    assert compare_capture(gather, lambda b: [b[0]], specs, [x, rows]).fault is Fault.DIFFERS


def test_a_capture_that_fails_elsewhere_is_told_from_one_that_is_wrong():
    finding = compare_capture(twice, lambda b: [2 * b[0][:4].reshape(4, 3)], FREE, [X])
    assert finding.fault is Fault.SIZE and finding.fails
    assert not compare_capture(twice, lambda b: [2 * b[0] if len(b[0]) > 1 else b[0]], FREE, [X]).fails
