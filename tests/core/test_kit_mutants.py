"""The backend kit notices every wrong backend of `kit_mutants`, and passes the right one on the same tests."""

import inspect
import re
from functools import cache

import pytest
from kit_mutants import CASES, MUTANTS, Kit

from bitwright.errors import BitwrightError
from bitwright.testing.backend_contract import Case
from bitwright.testing.reference import ReferenceBackend


def run_kit(backend, case, test, folder):
    """One test of the kit: `test_name`, `test_name[parameter]`, or `cover[feature]`."""
    kit = Kit(backend)
    name, _, parameter = re.fullmatch(r"([^\[]+)(\[(.*)\])?", test).groups()
    if name == "cover":
        kit._cases = lambda: {"case": CASES[case]}
        kit.test_cases_cover_what_goes_wrong(parameter)
        return
    method = getattr(kit, name)
    arguments = {"case": CASES[case], "tmp_path": folder, "name": parameter}
    wanted = [p for p in inspect.signature(method).parameters if p in arguments]
    method(**{p: arguments[p] for p in wanted})


@cache
def right_one_passes(case, test, folder):
    run_kit(ReferenceBackend(), case, test, folder)
    return True


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name for m in MUTANTS])
def test_the_kit_notices(mutant, tmp_path, monkeypatch):
    fresh = Case(CASES[mutant.case].build, CASES[mutant.case].batch)
    caught = []
    for test in mutant.tests:
        (tmp_path / "right").mkdir(exist_ok=True)
        (tmp_path / "wrong").mkdir(exist_ok=True)
        assert right_one_passes(mutant.case, test, tmp_path / "right")
        with monkeypatch.context() as patch:
            patch.setitem(CASES, mutant.case, fresh)  # what a mutant does to its model must not reach the others
            try:
                run_kit(mutant.backend(), mutant.case, test, tmp_path / "wrong")
            except pytest.skip.Exception as skipped:
                pytest.fail(f"{test} is skipped: {skipped}")
            except (AssertionError, pytest.fail.Exception, BitwrightError) as noticed:
                caught.append(noticed)
    assert caught, f"{mutant.name}: none of {', '.join(mutant.tests)} notices"


def test_there_are_enough():
    assert len(MUTANTS) > 100  # as README.md says
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
