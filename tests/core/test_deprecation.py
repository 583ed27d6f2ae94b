"""What is deprecated works on, and says at the caller's line since when, until when and what to use."""

from __future__ import annotations

import inspect
import warnings

import pytest

from bitwright.deprecation import deprecated, renamed_parameter
from bitwright.errors import InputError


@pytest.fixture(autouse=True)
def version(monkeypatch):
    monkeypatch.setattr("bitwright._version.__version__", "0.3.1")


def test_a_function_works_and_warns_at_the_callers_line():
    @deprecated(since="0.3", removed="0.5", instead="use twice()")
    def double(x: int) -> int:
        """Twice."""
        return 2 * x

    with pytest.warns(DeprecationWarning) as told:
        assert double(3) == 6
    line = inspect.currentframe().f_lineno - 1
    (one,) = told
    assert str(one.message) == (
        f"{__name__}.test_a_function_works_and_warns_at_the_callers_line.<locals>.double is deprecated since 0.3 "
        "and will be removed in 0.5; use twice()"
    )
    assert (one.filename, one.lineno) == (__file__, line)
    assert double.__name__ == "double" and double.__doc__ == "Twice." and double.__deprecated__ == str(one.message)
    assert list(inspect.signature(double).parameters) == ["x"]


def test_methods_and_classes_warn_when_they_are_used():
    class Box:
        @deprecated(since="0.3", removed="0.4", instead="use size")
        def length(self) -> int:
            return 7

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        box = Box()
    with pytest.warns(DeprecationWarning, match=r"Box\.length is deprecated"):
        assert box.length() == 7

    @deprecated(since="0.3", removed="0.4", instead="use Box")
    class Crate:
        def __init__(self, n: int, *, lid: bool = False) -> None:
            self.n, self.lid = n, lid

    with pytest.warns(DeprecationWarning, match=r"Crate is deprecated.*0\.4; use Box") as told:
        crate = Crate(3, lid=True)
    assert (crate.n, crate.lid, told[0].filename) == (3, True, __file__) and isinstance(crate, Crate)


def test_a_renamed_parameter_takes_the_old_keyword():
    @renamed_parameter("bits", "bitwidth", since="0.3", removed="0.4")
    def grid(low: float, bitwidth: int = 8) -> tuple[float, int]:
        return low, bitwidth

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grid(1.0) == (1.0, 8) and grid(1.0, bitwidth=4) == (1.0, 4) and grid(1.0, 4) == (1.0, 4)
    with pytest.warns(DeprecationWarning, match=r"'bits' of .*grid is deprecated since 0\.3 .*use 'bitwidth'"):
        assert grid(1.0, bits=4) == (1.0, 4)
    for given in ({"bits": 4, "bitwidth": 4, "low": 1.0}, {"bits": 4}):
        positional = () if "low" in given else (1.0, 4)
        with pytest.raises(InputError, match="got 'bits' and 'bitwidth', which are one parameter"):
            grid(*positional, **given)


@pytest.mark.parametrize(
    ("since", "removed", "message"),
    [
        ("0.3", "0.3", "works for a minor version at least after 0.3"),
        ("0.2", "0.3", "was to go in 0.3, and this is 0.3.1: remove it"),
        ("0.1", "0.2", "was to go in 0.2"),
        ("soon", "0.4", "'soon' is not a version"),
    ],
)
def test_dates_that_are_over_or_none_are_refused(since, removed, message):
    with pytest.raises(InputError, match=message):
        deprecated(since=since, removed=removed, instead="")(lambda: None)
    with pytest.raises(InputError, match=message):
        renamed_parameter("a", "b", since=since, removed=removed)(lambda b: b)


def test_a_major_version_is_later_than_any_minor():
    deprecated(since="0.9", removed="1.0", instead="")(lambda: None)


def test_a_parameter_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="has no parameter 'width'"):
        renamed_parameter("bits", "width", since="0.3", removed="0.4")(lambda bitwidth: bitwidth)
