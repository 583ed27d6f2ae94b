"""Foreign models, sampled: every operator's, ended as listed in known_*.toml, which may only shrink (`make suite`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import emission
import pytest
from foreign import Outcome
from suite import HERE, PAGE, RESULTS, SOURCES, Known, judge, parsed, sample, with_table
from test_harness import _gemm

from bitwright.graph import OpKind
from bitwright_onnx.emit import emitter


@pytest.mark.parametrize("source", SOURCES)
def test_foreign_models_end_as_listed(source, tmp_path):
    """In a process of its own, which forks its workers before any framework has started threads."""
    log = tmp_path / "outcomes.jsonl"
    command = [sys.executable, HERE / "suite.py", source, "--share", str(SOURCES[source].share), "--workers", "2",
               "--log", log]  # fmt: skip
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    outcomes = [Outcome(**{k: v for k, v in json.loads(line).items() if k != "source"}) for line in log.open()]
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert sum(o.kind == "ok" for o in outcomes) > 0.6 * len(outcomes)


@pytest.mark.parametrize("source", SOURCES)
def test_the_list_gives_reasons_and_names_no_model_twice(source):
    import tomllib

    held = tomllib.loads((HERE / f"known_{source}.toml").read_text())
    for what in ("refused", "limited"):
        names = [m for entry in held.get(what, ()) for m in entry["models"]]
        assert len(names) == len(set(names))
        assert all(len(entry["why"]) > 20 and entry["models"] for entry in held.get(what, ()))


def test_the_table_in_the_documentation_is_that_of_the_results():
    page = PAGE.read_text()
    assert with_table(page, json.loads(RESULTS.read_text())) == page


def test_the_table_of_what_is_written_is_that_of_the_results():
    page = PAGE.read_text()
    assert emission.with_table(page, json.loads(emission.RESULTS.read_text())) == page


def test_reasons_are_counted_by_model_and_name_the_types():
    notes = ["its bounds aren't known\tClip", "its bounds aren't known\tRelu6"]
    refused = [Outcome(n, "g", "refused", "write", "", notes[:k]) for n, k in (("a", 1), ("b", 2))]
    checked = Outcome("c", "g", "refused", "write", "running the model on x failed: Non-zero status")
    found = emission.record([*refused, checked, Outcome("d", "g"), Outcome("e", "g", "not run")], 9)
    assert (found["models"], found["opened"], found["covered"], found["refused"], found["seen"]) == (5, 4, 1, 3, 1)
    assert found["reasons"] == {
        "its bounds aren't known (Clip, Relu6)": 2, "ONNX Runtime doesn't run what is written: Non-zero status": 1,
    }  # fmt: skip


def test_a_writer_that_writes_something_else_covers_nothing(monkeypatch):
    assert emission.examine(_gemm()).kind == "ok"

    def other(sheet, op):
        return sheet.node(op, "Relu", sheet.values[op.data_inputs[0]])

    monkeypatch.setitem(emitter._BY_KIND, OpKind.LINEAR, other)
    found = emission.examine(_gemm())
    assert (found.kind, found.step, found.notes) == ("refused", "write", [])


def test_a_sample_has_every_group():
    names = {f"{g}{i}": g for g, n in (("a", 1), ("b", 7), ("c", 40)) for i in range(n)}
    chosen = sample(names, 8)
    assert {names[n] for n in chosen} == {"a", "b", "c"} and len(chosen) == 1 + 1 + 5
    assert set(sample(names, 16)) <= set(chosen)


LISTED = Known({"old": ("says so", "a reason")}, {"vague": "a reason"})


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (Outcome("new", "g", "refused", "open", "E: no"), "not listed"),
        (Outcome("old", "g", "refused", "open", "E: something else"), "another reason"),
        (Outcome("old", "g", "refused", "open", "E: says so"), None),
        (Outcome("old", "g"), "take it off"),
        (Outcome("vague", "g", notes=["y: half a step"]), None),
        (Outcome("vague", "g"), "take it off"),
        (Outcome("new", "g", notes=["y: half a step"]), "isn't listed"),
        (Outcome("new", "g"), None),
        (Outcome("new", "g", "not run", "model", "no kernel"), None),
        *[(Outcome("old", "g", kind, "float", "x"), kind) for kind in ("untyped", "wrong", "crashed", "late")],
    ],
)
def test_judgement(outcome, problem):
    found = judge([outcome], LISTED, ["old", "vague", "new"])
    assert found == [] if problem is None else len(found) == 1 and problem in found[0]


def test_a_listed_model_that_is_gone_is_told():
    assert judge([], LISTED, ["old"]) == ["vague: is listed, but there is no such model"]


def test_paths_are_those_of_the_repository():
    assert Path(__file__).parent == HERE and PAGE.exists()


def test_without_a_source_all_are_run():
    assert parsed([]).sources == list(SOURCES)
    assert parsed(["torch", "--share", "4"]).sources == ["torch"]
