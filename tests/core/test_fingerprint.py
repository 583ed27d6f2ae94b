"""Fingerprints of what people write: functions and their closures, text."""

import functools

import numpy as np
import pytest

from bitwright.runs import fingerprint


def counted(function):
    """A decorator whose function holds itself."""

    @functools.wraps(function)
    def wrapper(*args):
        wrapper.calls += 1
        return function(*args)

    wrapper.calls = 0
    return wrapper


def test_functions_and_collections_that_hold_themselves_are_told_apart_like_others():
    same, other = counted(lambda x: x * 2), counted(lambda x: x * 3)
    assert fingerprint.of_object(counted(lambda x: x * 2)) == fingerprint.of_object(same)
    assert fingerprint.of_object(same) != fingerprint.of_object(other)
    circle = [1]
    circle.append(circle)
    assert fingerprint.of_object(circle) != fingerprint.of_object([1])
    twice = [2]
    assert fingerprint.of_object([twice, twice]) == fingerprint.of_object([[2], [2]])  # no circle


def test_defaults_of_keyword_arguments_are_told():
    def scaled(by):
        return lambda x, *, factor=by: x * factor

    assert fingerprint.of_object(scaled(2)) == fingerprint.of_object(scaled(2))
    assert fingerprint.of_object(scaled(2)) != fingerprint.of_object(scaled(3))


@pytest.mark.parametrize("texts", [["a", "b"], [b"a", b"\xff"]])
def test_text_is_hashed_by_what_it_says(texts):
    of = lambda values: fingerprint.of_arrays([("", np.array(values, object))])
    assert of(texts) == of(list(texts)) != of(texts[::-1])
