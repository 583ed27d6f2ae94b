"""auto_quantize on a small network: order, stopping, failures, budgets, executors, what it writes."""

from __future__ import annotations

import json
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest

from bitwright import QuantSim, RunDirectory, auto_quantize
from bitwright.errors import CapabilityError, InputError, ModelError, PluginError
from bitwright.hookspecs import AutoStage
from bitwright.plugins import default_registry
from bitwright.technique import Outcome, Report, Settings
from bitwright_search.auto_result import Status
from bitwright_search.evaluation import measure_saved
from bitwright_search.sensitivity import noise_of

HARD = {"target": "per_tensor", "weights": "int4"}


def trial(result, name):
    return next(t for t in result.trials if t.name == name)


def summary(result):
    return [(t.name, t.status, t.score, t.steps) for t in result.trials]


@pytest.fixture(scope="module")
def hard(net):
    """A goal that can't be reached, so that everything is tried."""
    return auto_quantize(net.model, net.images, net.fidelity, allowed_drop=0.0, **HARD)


def test_everything_is_tried_in_order_and_the_best_comes_back(hard, net):
    names = [t.name for t in hard.trials]
    assert names == ["fold_batch_norm", "float", "weights only", "activations only", "sqnr", "minmax",
                     "percentile:99.99", "mse", "sqnr, weights mse", "cross_layer_equalization", "bias_correction",
                     "adaround", "13 wider", "13 wider, techniques anew"]  # fmt: skip
    assert not hard.met
    assert hard.float_score == pytest.approx(1.0, abs=1e-5)
    assert hard.score == max(t.score for t in hard.trials if t.kind in ("calibration", "technique", "types"))
    assert hard.score == net.fidelity(hard.model)
    assert hard.evaluations == 13
    assert hard.drop == pytest.approx(hard.float_score - hard.score)
    assert any("Not even 16 bits" in line for line in hard.advice)
    assert "beyond the allowed 0" in str(hard)


def test_each_stage_builds_on_the_best_so_far(hard):
    best, before_correction = None, None
    for t in hard.trials:
        if t.kind == "technique":
            if t.name == "bias_correction":
                before_correction = best
            # AdaRound solves biases itself: it starts from what bias correction hasn't changed.
            base = before_correction if t.name == "adaround" else best
            assert t.steps == (*base.steps, t.name)
            assert t.status is (Status.KEPT if t.score >= best.score else Status.WORSE)
            best = t if t.status is Status.KEPT else best
        elif t.kind in ("calibration", "types") and (best is None or t.score > best.score):
            best = t
    assert best.steps == hard.steps


def test_it_stops_at_the_first_that_is_good_enough(net):
    seen = []

    def evaluate(model):
        seen.append(net.fidelity(model))
        return seen[-1]

    result = auto_quantize(net.model, net.images, evaluate, allowed_drop=0.2)
    assert result.met
    assert [t.name for t in result.trials][-1] == result.steps[-1] == "sqnr"
    assert len(seen) == result.evaluations == 4
    assert "bitwright verify" in result.advice[0]


def test_techniques_recover_what_calibration_cannot(net):
    """Channel ranges that cancel between layers are what equalization is for."""
    result = auto_quantize(net.model, net.images, net.data, target="per_tensor", allowed_drop=0.01,
                           schemes=["minmax"])  # fmt: skip
    assert trial(result, "minmax").score < 0.7
    assert trial(result, "cross_layer_equalization").status is Status.KEPT
    assert result.met


def test_the_order_and_settings_of_a_recipe(net):
    steps = [{"bias_correction": {"mode": "empirical"}}, "cle"]
    result = auto_quantize(net.model, net.images, net.fidelity, allowed_drop=0.0, techniques=steps,
                           schemes=["minmax"], **HARD)  # fmt: skip
    assert [t.name for t in result.trials if t.kind == "technique"] == ["bias_correction", "cross_layer_equalization"]
    assert trial(result, "bias_correction").settings == {"mode": "empirical"}
    assert not any(t.kind == "preparation" for t in result.trials)


class Spoiler:
    """A technique that fails as the test wants it."""

    name = "spoiler"
    Settings = Settings
    requires = frozenset()
    auto = AutoStage(15)
    error: Exception | None = None

    def statistics(self, graph, plan, settings):
        return []

    def apply(self, ctx):
        if self.error is not None:
            raise self.error
        return Outcome(report=Report("looked at it and left it"))


@pytest.fixture
def spoiler(monkeypatch):
    """The registry with one more technique that takes part."""
    from bitwright import registry

    fresh = registry.Registry(entry_points=False)
    monkeypatch.setattr(registry, "default_registry", lambda: fresh)
    fresh.add(Spoiler)
    yield Spoiler
    Spoiler.error = None


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("broken"), Status.FAILED, "ValueError: broken"),
        (InputError("needs more data"), Status.FAILED, "needs more data"),
        (CapabilityError("the backend can't"), Status.SKIPPED, "the backend can't"),
        (None, Status.UNCHANGED, "looked at it and left it"),
    ],
)
def test_a_technique_that_fails_or_does_nothing_is_noted_and_passed_over(net, spoiler, error, status, reason):
    spoiler.error = error
    result = auto_quantize(net.model, net.images[:32], net.fidelity, allowed_drop=0.0, schemes=["minmax"],
                           techniques="bn_fold,spoiler,cle", **HARD)  # fmt: skip
    found = trial(result, "spoiler")
    assert (found.status, found.reason) == (status, reason)
    assert "spoiler" not in result.steps
    assert trial(result, "cross_layer_equalization").score is not None
    assert result.evaluations == sum(t.score is not None for t in result.trials if t.status is not Status.UNCHANGED)
    assert any("spoiler failed" in line for line in result.advice) == (status is Status.FAILED)


def test_schemes_of_what_costs_nothing_are_left_out(net):
    """The first network is bad, its activations alone are not: only weights are worth another scheme."""
    scores = iter([1.0, 0.5, 1.0, 0.4, 0.6])
    result = auto_quantize(net.model, net.images, lambda model: next(scores), allowed_drop=0.1, techniques="bn_fold")
    left_out = [t.name for t in result.trials if t.status is Status.SKIPPED]
    assert left_out == ["minmax", "percentile:99.99", "mse"]
    assert trial(result, "mse").reason == "quantized activations alone cost nothing"
    assert result.steps == ("fold_batch_norm", "sqnr, weights mse")


def test_schemes_that_are_left_out_take_no_evaluation_of_the_budget(net):
    scores = iter([1.0, 0.5, 1.0, 0.4, 0.6])
    result = auto_quantize(
        net.model, net.images, lambda model: next(scores), allowed_drop=0.1, techniques="bn_fold", budget_evaluations=5
    )
    assert result.score == 0.6
    assert trial(result, "sqnr, weights mse").score == 0.6


def test_an_evaluation_that_fails_costs_its_network_alone(net):
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return float("nan") if len(calls) == 6 else net.fidelity(model)

    result = auto_quantize(net.model, net.images, evaluate, allowed_drop=0.0, techniques="cle", **HARD)
    assert trial(result, "minmax").reason == "RuntimeError: out of memory"
    assert "finite number" in trial(result, "percentile:99.99").reason
    assert trial(result, "mse").score is not None
    assert result.score == net.fidelity(result.model)


def test_an_evaluation_that_never_works_is_an_error_and_not_nothing(net):
    def evaluate(model):
        raise KeyError("accuracy")

    with pytest.raises(KeyError, match="accuracy"):
        auto_quantize(net.model, net.images, evaluate, allowed_drop=0.1)

    calls = []

    def only_float(model):
        calls.append(1)
        return 1.0 if len(calls) == 1 else None

    with pytest.raises(InputError, match=r"no quantized network could be evaluated: .*evaluate returned None"):
        auto_quantize(net.model, net.images, only_float, allowed_drop=0.1)


@pytest.mark.parametrize("budget", [2, 3, 6])
def test_a_budget_of_evaluations(net, budget):
    calls = []

    def evaluate(model):
        calls.append(1)
        return net.fidelity(model)

    result = auto_quantize(net.model, net.images, evaluate, allowed_drop=0.0, budget_evaluations=budget, **HARD)
    assert len(calls) == result.evaluations == budget
    assert result.score == net.fidelity(result.model)
    assert any(f"budget of {budget} evaluations" in line for line in result.advice)


def test_a_budget_of_seconds(net):
    result = auto_quantize(net.model, net.images, net.fidelity, allowed_drop=0.0, budget_seconds=1e-6, **HARD)
    assert [t.name for t in result.trials if t.kind == "calibration" and t.score is not None] == ["sqnr"]
    assert any("budget" in t.reason for t in result.trials)
    assert result.score == net.fidelity(result.model)


class Immediate(Executor):
    """Runs what is submitted at once, and counts it."""

    def __init__(self):
        self.submitted = []

    def submit(self, function, /, *arguments, **keywords):
        future: Future = Future()
        self.submitted.append((function, arguments))
        future.set_result(function(*arguments, **keywords))
        return future


def test_any_executor_gives_the_same_result(net):
    """Threads, processes, and an executor of one's own."""
    options = {"schemes": ["sqnr", "minmax"], "techniques": "bn_fold,cle", "allowed_drop": 0.0, **HARD}
    plain = auto_quantize(net.model, net.images, net.fidelity, **options)
    own = Immediate()
    pools = [own, ThreadPoolExecutor(2), ProcessPoolExecutor(1, mp_context=get_context("spawn"))]
    for pool in pools:
        with pool:
            result = auto_quantize(net.model, net.images, net.fidelity, executor=pool, **options)
        assert summary(result) == summary(plain)
        assert result.best == plain.best
    # Types are tried one after the other, here; what decides on them is measured side by side.
    alone = sum(t.kind == "types" for t in plain.trials)
    assert sum(function is measure_saved for function, _ in own.submitted) == plain.evaluations - alone
    assert sum(function is noise_of for function, _ in own.submitted) == 13


def test_an_executor_stops_where_one_process_stops(net):
    result = auto_quantize(net.model, net.images, net.data, allowed_drop=0.05, executor=Immediate())
    assert [t.name for t in result.trials][-1] == "sqnr"
    assert result.evaluations == 4


CALLS: list[int] = []
"""Not in a closure: what an evaluation holds is a part of it, and a new value makes it another one."""


def test_finished_stages_are_not_run_again(net, tmp_path):
    CALLS.clear()

    def evaluate(model):
        CALLS.append(1)
        return net.fidelity(model)

    options = {"schemes": ["sqnr", "minmax"], "techniques": "bn_fold,cle", "allowed_drop": 0.0, **HARD}
    first = auto_quantize(net.model, net.images, evaluate, run=tmp_path / "run", **options)
    count = len(CALLS)
    again = auto_quantize(net.model, net.images, evaluate, run=tmp_path / "run", **options)
    assert len(CALLS) == count
    assert summary(again) == summary(first)
    assert again.seconds == pytest.approx(first.seconds, rel=0.2)
    assert [r.summary for _, r in again.sim.reports] == [r.summary for _, r in first.sim.reports]
    assert all(again.sim.encodings[s].equals(e) for s, e in first.sim.encodings.items())
    with RunDirectory(tmp_path / "run") as run:
        other = auto_quantize(net.model, net.images[:48], evaluate, run=run, **options)
    assert len(CALLS) > count, "other calibration data are other stages"
    assert other.sim.run is run


def test_a_damaged_state_is_made_again(net, tmp_path):
    first = auto_quantize(net.model, net.images, net.data, allowed_drop=0.05, run=tmp_path / "run")
    for state in (tmp_path / "run").glob("steps/*/state/*"):
        state.write_bytes(b"damaged")
    again = auto_quantize(net.model, net.images, net.data, allowed_drop=0.05, run=tmp_path / "run")
    assert summary(again) == summary(first)


def test_what_it_writes(net, tmp_path):
    result = auto_quantize(net.model, net.images, net.data, allowed_drop=0.05, out=tmp_path / "out", plain_session=True)
    assert result.bundle.stored_anew
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"net.onnx", "net.encodings", "net.qdq.onnx", "net.record.npz", "report.json", "report.html",
                     "diagnosis.json", "diagnosis.html", ".run"}  # fmt: skip
    assert {p.name for p in result.files.values()} == names - {".run"}
    told = json.loads((tmp_path / "out/diagnosis.json").read_text())
    assert told["met"] is True
    assert [t["name"] for t in told["trials"]] == [t.name for t in result.trials]
    assert told["score"] == result.score
    accuracy = json.loads((tmp_path / "out/report.json").read_text())["accuracy"]  # `bitwright report` lists it
    assert (accuracy["samples"], accuracy["float_model"]) == (len(net.labels), result.float_score)
    assert (accuracy["simulated"], accuracy["agreement"]) == (result.score, None)
    from bitwright.verify import verify

    seen = verify(tmp_path / "out", {"image": net.images}, net.labels)
    assert seen.accuracy["simulated"] == pytest.approx(result.score)


@pytest.mark.parametrize("words", [
    ["auto", "--allowed-drop", "0.99", "--schemes", "minmax", "--labels"],
    ["mixed-precision", "--budget", "0.9", "--candidates", "int8/uint8,int4/uint8", "--labels"],
])  # fmt: skip
def test_the_commands_write_the_formats_asked_for(net, tmp_path, words, capsys):
    from bitwright.cli import main

    def run(*formats):
        out = tmp_path / "-".join(formats)
        begin = [words[0], net.model, "--data", net.folder / "images.npy", "--out", out, "--quiet"]
        asked = [f"--format={f}" for f in formats]
        return main([str(w) for w in (*begin, *words[1:], net.folder / "labels.npy", *asked)]), out

    done, out = run("onnx")
    assert done == 0
    written = {p.suffix for p in out.iterdir() if p.stem == "net" or p.stem.startswith("net.")}
    assert written == {".onnx", ".encodings", ".npz"}
    assert not (out / "net.qdq.onnx").exists()
    assert (out / "report.json").exists()
    assert list(out.glob(".run/steps/*"))
    done, out = run("onnx", "savedmodel")
    assert done == 2
    assert "savedmodel" in capsys.readouterr().err
    assert not list(out.glob(".run/steps/*")), "refused before the search"


def test_a_simulation_of_ones_own(net):
    sim = QuantSim(net.model, target="per_tensor", overrides={"res": "float"})
    before = sim.plan.table()
    result = auto_quantize(sim, net.images, net.data, allowed_drop=0.05)
    assert sim.plan.table() == before
    assert not sim.encodings
    assert result.sim.plan["res.weight"].decision.reason
    with pytest.raises(InputError, match="weights: the simulation given has its own"):
        auto_quantize(sim, net.images, net.data, allowed_drop=0.05, weights="int4")


def test_wide_activations_keep_their_whole_range(net):
    result = auto_quantize(net.model, net.images, net.fidelity, allowed_drop=0.0, weights="int4", activations="uint16",
                           techniques="cle")  # fmt: skip
    assert [t.name for t in result.trials if t.kind == "calibration"] == ["sqnr", "sqnr, weights mse"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"allowed_drop": -1.0}, InputError, "allowed_drop=-1"),
        ({"allowed_drop": float("nan")}, InputError, "allowed_drop=nan"),
        ({"budget_evaluations": 1}, InputError, "the float model and one network need 2"),
        ({"budget_seconds": 0}, InputError, "budget_seconds=0"),
        ({"name": "a/b"}, InputError, "can't be a file name"),
        ({"schemes": []}, InputError, "schemes is empty"),
        ({"schemes": ["best"]}, InputError, "unknown calibration scheme 'best'"),
        ({"techniques": "magic"}, PluginError, "magic"),
        ({"evaluate": 3}, InputError, "give a function"),
        ({"evaluate": ("images", [1, 2])}, InputError, "images"),
        ({"model": "nowhere.onnx"}, InputError, "there is no"),
    ],
)
def test_bad_arguments_fail_before_any_work(net, tmp_path, change, error, message):
    arguments = {"model": net.model, "evaluate": net.data, "allowed_drop": 0.1, "out": tmp_path / "out", **change}
    with pytest.raises(error, match=message):
        auto_quantize(arguments.pop("model"), net.images, arguments.pop("evaluate"), **arguments)
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_opened(tmp_path, net):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises((ModelError, InputError)):
        auto_quantize(tmp_path / "bad.onnx", net.images, net.data, allowed_drop=0.1)


def test_the_command(net, capsys, tmp_path):
    from bitwright.cli import main

    score = tmp_path / "score.py"
    score.write_text(
        "import numpy as np\n"
        f"images, labels = np.load({str(net.folder / 'images.npy')!r}), np.load({str(net.folder / 'labels.npy')!r})\n"
        "def top1(model):\n"
        "    return (model({'image': images})['scores'].argmax(1) == labels).mean()\n"
    )
    common = ["auto", net.model, "--data", net.folder / "images.npy", "--out", tmp_path / "out", "--quiet"]

    def run(*words):
        status = main([str(w) for w in (*common, *words)])
        return status, *capsys.readouterr()

    status, out, _ = run("--labels", net.folder / "labels.npy", "--allowed-drop", "0.05", "--workers", "2")
    assert status == 0
    assert "within the allowed 5.00 points" in out
    assert "diagnosis.html" in out
    status, out, err = run("--evaluate", f"{score}:top1", "--allowed-drop", "0", "--weights", "int3", "--schemes",
                           "minmax", "--recipe", "cle", "--no-wider")  # fmt: skip
    assert status == 1
    assert "no network is within a drop of 0" in err
    assert run("--allowed-drop", "0.1")[0] == 2
    assert "either --labels" in run("--allowed-drop", "0.1")[2]
    assert "no function 'x'" in run("--allowed-drop", "0.1", "--evaluate", f"{score}:x")[2]
    assert "file.py:function" in run("--allowed-drop", "0.1", "--evaluate", "score")[2]


def test_the_tool_is_found_by_name():
    assert default_registry().tool("auto_quantize") is auto_quantize
