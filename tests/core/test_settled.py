"""While objects are settled, memory is looked for among newer ones; afterwards everything is as it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from bitwright.backend import let_go, settled


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """The suite runs with objects frozen (`tests/conftest.py`)."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    if frozen:
        gc.freeze()


class Circle:
    def __init__(self) -> None:
        self.me = self


def test_what_is_made_since_is_let_go_and_the_rest_once_it_is_over() -> None:
    old = Circle()
    before = weakref.ref(old)
    with settled():
        del old
        made = weakref.ref(Circle())
        let_go()
        assert made() is None
        assert before() is not None
        with settled():
            assert gc.get_freeze_count()
        assert gc.get_freeze_count(), "the outer one is still open"
    assert not gc.get_freeze_count()
    let_go()
    assert before() is None


def test_what_others_have_frozen_stays_so() -> None:
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        kept = [Circle() for _ in range(100)]
        with settled():
            assert gc.get_freeze_count() <= count, "nothing was added"
        assert gc.get_freeze_count()
        assert len(kept) == 100
    finally:
        gc.unfreeze()


def test_it_is_closed_by_errors_too() -> None:
    with pytest.raises(ValueError, match="told"), settled():
        raise ValueError("told")
    assert not gc.get_freeze_count()
