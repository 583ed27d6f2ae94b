"""Two runs beside each other, and the index of a folder of runs."""

import json

import pytest

from bitwright.cli import BAD_INPUT, DONE, main
from bitwright.errors import InputError
from bitwright.report import (
    Accuracy,
    LayerRow,
    RunReport,
    SiteRow,
    StepRecord,
    difference,
    read_run,
    render_difference,
    render_index,
    runs_in,
    write_report,
)
from bitwright.report._model import ModelInfo

EVIL = "<script>alert(1)</script>"


def step(technique):
    return StepRecord(technique=technique, summary="")


def run(name="net", *, simulated=None, steps=(), low=-1.0, weights="int8", decision="quantized", size=1000):
    site = SiteRow(site="x", kind="activation", op="", decision=decision, detail="uint8 asymmetric", low=low, high=1.0,
                   scale_smallest=0.1, scale_largest=0.1, digest=str(low))  # fmt: skip
    layer = LayerRow(op=EVIL, type="Conv", weight="w", shape=(1,), quantizer="int8", range_smallest=1, range_median=1,
                     range_largest=1, sqnr_db=40.0 + low)  # fmt: skip
    return RunReport(
        created="2026-11-29T08:00:00+00:00", name=name, target="htp_v73", target_config={}, weights=weights,
        activations=None, overrides={}, seed=0, calibration=None, 
        steps=tuple(map(step, steps)),
        model=ModelInfo(source="net.onnx", backend="onnx", ops=1, opaque_ops=0, parameters=10, float_bytes=4000,
                        quantized_bytes=size, inputs={}, outputs={}),
        sites=(site,), layers=(layer,), seconds={}, versions={"numpy": "2.0"}, files={},
        accuracy=None
        if simulated is None
        else Accuracy(samples=100, float_model=0.9, simulated=simulated, agreement=0.9),
    )  # fmt: skip


def test_the_difference_says_what_was_done_differently_and_what_came_of_it():
    found = difference(run(simulated=0.80), run(simulated=0.85, steps=("cle",), low=-2.0, weights="int4", size=500))
    assert "5.00 points above A's: 85.00% and 80.00%" in found.verdict
    assert "500 B instead of 1 kB" in found.verdict and "Different: 2 settings, 1 site." in found.verdict
    assert found.settings == (("weights", "int8", "int4"), ("techniques", "none", "cle"))
    rounded = [run(steps=("cle",)), run(steps=("cle",))]
    rounded[1] = rounded[1].model_copy(update={"steps": (StepRecord(technique="cle", summary="", settings={"n": 2}),)})
    assert difference(*rounded).settings == (("cle: n", "–", "2"),)
    assert found.sites == (("x", "grid", "-1 to 1", "-2 to 1"),)
    assert found.layers == ((EVIL, 39.0, 38.0),)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, ("-1 to 1", "-1 to 1, not the same inside")),
        ({"scale_smallest": 1e-7}, ("scales 0.1 to 0.1", "scales 1e-07 to 0.1")),
    ],
)
def test_grids_of_the_same_ends_are_told_apart(changed, told):
    report = run()
    site = report.sites[0].model_copy(update={"digest": "other", **changed})
    assert difference(report, report.model_copy(update={"sites": (site,)})).sites == (("x", "grid", *told),)


def test_equal_runs_differ_in_nothing_and_decisions_are_told():
    found = difference(run(simulated=0.8), run(simulated=0.8))
    assert not found.settings and not found.sites
    assert "Both reach a top-1 of 80.00%" in found.verdict and "are the same" in found.verdict
    assert difference(run(), run(decision="float")).sites[0][1] == "decision"
    assert "wasn't measured in both" in difference(run(), run(simulated=0.8)).verdict


def test_fused_sites_that_an_older_report_calls_float_are_the_same():
    assert difference(run(decision="float"), run(decision="fused")).sites == ()
    assert difference(run(), run(decision="fused")).sites[0][1:3] == ("decision", "quantized, uint8 asymmetric")


def test_the_page_is_escaped():
    page = render_difference(run(), run(low=-3.0), (EVIL, "b"))
    assert EVIL not in page and "Sites that differ" in page and "class=verdict" in page


def test_commands_write_both_pages(tmp_path, capsys):
    for folder, value in (("low", 0.5), ("high", 0.75), ("none", None)):
        (tmp_path / folder).mkdir()
        write_report(run(folder, simulated=value), tmp_path / folder)
    page = tmp_path / "diff.html"
    assert main(["diff", str(tmp_path / "low"), str(tmp_path / "high" / "report.json"), "--out", str(page)]) == DONE
    assert "25.00 points above" in capsys.readouterr().out and "25.00 points above" in page.read_text()
    assert main(["report", str(tmp_path), "--json"]) == DONE
    rows = json.loads(capsys.readouterr().out)
    assert [r["Run"] for r in rows] == ["high", "low", "none"]
    assert [r["Top-1 %"] for r in rows] == [75.0, 50.0, None] and rows[0]["Points to float"] == pytest.approx(-15)
    assert main(["report", str(tmp_path)]) == DONE
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[1:4]] == ["high/high", "low/low", "none/none"]
    index = (tmp_path / "index.html").read_text()
    assert 'href="high/report.html"' in index and "the best of 2 with labels is high/high" in index


def test_what_is_no_run_is_refused_or_named(tmp_path, capsys):
    assert main(["diff", str(tmp_path), str(tmp_path)]) == BAD_INPUT
    assert main(["report", str(tmp_path)]) == BAD_INPUT
    assert main(["report", str(tmp_path / "gone")]) == BAD_INPUT
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "report.json").write_text("{}")
    (tmp_path / "good").mkdir()
    write_report(run(), tmp_path / "good")
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == DONE
    assert "bad/report.json is no report of a run" in capsys.readouterr().err
    with pytest.raises(InputError, match="none"):
        read_run(tmp_path)
    runs, damaged = runs_in(tmp_path)
    assert len(runs) == 1 and len(damaged) == 1
    assert "1 run." in render_index(tmp_path, runs)
