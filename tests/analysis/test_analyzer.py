from __future__ import annotations

import json

import numpy as np
import pytest
from analysis_models import conv_model, mlp, onnx

import bitwright
from bitwright import QuantSim, RunDirectory
from bitwright.errors import InputError
from bitwright_analysis import analyzer, scoring
from bitwright_analysis.advice import Evidence, advice
from bitwright_analysis.records import Analysis, LayerError, Overall


def analyze(model, data, *args, **options):
    return bitwright.quant_analyzer(model, data, *args, **{"batch_size": 64, **options})


def outliers(layers, index):
    """A few large values in one layer's weights: with one scale, the rest of them lose their steps."""
    rng = np.random.default_rng(3)
    noisy = [(w.copy(), b.copy()) for w, b in layers]
    weight = noisy[index][0]
    where = rng.choice(weight.size, 3, replace=False)
    weight.flat[where] += 12 * weight.std() * rng.choice([-1, 1], 3)
    return noisy


@pytest.mark.parametrize("index", range(4))
def test_names_the_layer_whose_weights_have_noise(trained, index):
    found = analyze(mlp(outliers(trained.layers, index)), trained.x, target="per_tensor", limit=128)
    weights, layers = found.ranking("weight"), found.ranking("layer")
    assert weights[0].unit == f"fc{index + 1}.weight"
    assert layers[0].unit == f"fc{index + 1}"
    assert weights[0].alone < weights[1].alone
    assert max(weights, key=lambda s: s.gain).unit == f"fc{index + 1}.weight"


def test_names_the_site_whose_grid_is_spoilt(trained):
    sim = QuantSim(trained.model).calibrate(trained.x)
    grid = sim.encodings["relu2.out"]
    sim.set({"relu2.out": grid.with_(scale=grid.scale * 16)})
    found = analyze(sim, trained.x)
    assert found.ranking()[0].unit == "relu2.out"
    assert found.ranking()[0].kind == "activation"


def test_sensitivities_are_those_of_simulations_built_anew(trained):
    """Switching sites of one simulation gives what a plan with everything else in float gives."""
    sim = QuantSim(trained.model, weights="int4").calibrate(trained.x)
    found = analyze(sim, trained.x, sweep_samples=None)
    reference = sim.predict(trained.x, simulated=False)[0].astype(np.float64)
    for unit in ("fc2.weight", "relu1.out"):
        rest = {s: "float" for s in (*sim.plan.activations, *sim.plan.parameters) if s != unit}
        alone = QuantSim(trained.model, weights="int4", overrides=rest).calibrate(trained.x)
        alone.set({unit: sim.encodings[unit]})
        noise = np.square(alone.predict(trained.x)[0] - reference).sum()
        row = next(s for s in found.sensitivities if s.unit == unit)
        assert row.alone == pytest.approx(10 * np.log10(np.square(reference).sum() / noise), abs=1e-6)


def test_overall_figures_by_labels_and_by_evaluation_agree(trained):
    def accuracy(model):
        return float((model({"features": trained.x})["scores"].argmax(1) == trained.labels).mean())

    sim = QuantSim(trained.model, weights="int4").calibrate(trained.x)
    by_labels = analyze(sim, trained.x, labels=trained.labels, sweep_by="evaluate")
    by_function = analyze(sim, trained.x, accuracy, sweep_by="evaluate")
    assert by_labels.measure == "top-1" and by_function.measure == "accuracy"
    assert [o.score for o in by_labels.overall] == [o.score for o in by_function.overall]
    assert [s.alone for s in by_labels.ranking()] == [s.alone for s in by_function.ranking()]


def test_weights_only_and_activations_only(trained):
    found = analyze(trained.model, trained.x, labels=trained.labels, weights="int4", activations="uint16")
    assert found.setting("float").sqnr_db is None or found.setting("float").sqnr_db > 120
    assert found.setting("weights only").sqnr_db < found.setting("activations only").sqnr_db
    assert found.setting("quantized").sqnr_db == pytest.approx(found.setting("weights only").sqnr_db, abs=0.5)
    assert found.setting("float").score > 0.95


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_nothing_depends_on_the_batch_size(trained, images, model):
    native, data = (trained.model, trained.x[:15]) if model == "mlp" else (conv_model(), images[:9])
    sim = QuantSim(native, target="htp_v66").calibrate(data)
    whole, *others = (analyze(sim, data, batch_size=n, directions=("alone",)) for n in (len(data), 1, 4))
    for other in others:
        for a, b in zip(whole.layers, other.layers, strict=True):
            assert a.tensor == b.tensor
            assert b.mse == pytest.approx(a.mse, rel=1e-9)
            assert b.shift == pytest.approx(a.shift, rel=1e-9)
            assert b.max_error == a.max_error
        for a, b in zip(whole.sensitivities, other.sensitivities, strict=True):
            assert (a.unit, a.kind) == (b.unit, b.kind)
            assert b.harm == pytest.approx(a.harm, rel=1e-9)
        assert [d.counts for d in whole.activations] == [d.counts for d in other.activations]
        assert [d.channel_low for d in whole.activations] == [d.channel_low for d in other.activations]


def test_layer_errors_are_plain_means(trained):
    sim = QuantSim(trained.model, weights="int4").calibrate(trained.x)
    found = analyze(sim, trained.x)
    output = next(e for e in found.layers if e.tensor == "scores")
    error = sim.predict(trained.x)[0].astype(np.float64) - sim.predict(trained.x, simulated=False)[0]
    assert output.mse == pytest.approx(np.square(error).mean(), rel=1e-12)
    assert output.max_error == np.abs(error).max()
    offset = np.square(error.mean(axis=0)).sum() / np.square(error).mean(axis=0).sum()
    assert output.shift == pytest.approx(offset, rel=1e-9)
    assert output.sqnr_db == pytest.approx(found.setting("quantized").sqnr_db, abs=1e-6)


def test_the_users_simulation_stays_as_it_is(trained):
    sim = QuantSim(trained.model).calibrate(trained.x)
    before, state = sim.predict(trained.x)[0], sim.state
    analyze(sim, trained.x, limit=32)
    assert sim.state is state
    assert np.array_equal(sim.predict(trained.x)[0], before)
    raw = QuantSim(trained.model)
    analyze(raw, trained.x, limit=32)
    assert not raw.encodings


def test_goes_on_from_the_last_finished_measurement(trained, tmp_path, monkeypatch):
    sim = QuantSim(trained.model).calibrate(trained.x)
    expected = analyze(sim, trained.x)
    calls = []
    original = scoring.OutputNoise.__call__

    def counted(self, simulation):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(1)
        return original(self, simulation)

    monkeypatch.setattr(scoring.OutputNoise, "__call__", counted)
    stop = 9
    with pytest.raises(KeyboardInterrupt):
        analyze(sim, trained.x, run=tmp_path / "run")
    stop = -1
    resumed = analyze(sim, trained.x, run=tmp_path / "run")
    total = len(calls)
    again = analyze(sim, trained.x, run=tmp_path / "run")
    assert len(calls) == total, "everything was there already"
    for found in (resumed, again):
        assert found.sensitivities == expected.sensitivities and found.overall == expected.overall
    other = QuantSim(trained.model, weights="int4").calibrate(trained.x)
    analyze(other, trained.x, run=tmp_path / "run")
    assert len(calls) == 2 * total, "another simulation's measurements are its own"


def test_an_evaluation_that_has_changed_is_asked_again(trained, tmp_path):
    """Two functions of one name, as after an edit: the stored scores are those of the first."""

    def scores(value):
        found = analyze(trained.model, trained.x, lambda model: value, run=tmp_path / "run", limit=32)
        return [row.score for row in found.overall]

    assert scores(0.25) == [0.25] * 4
    assert scores(0.75) == [0.75] * 4


def test_a_run_directory_of_the_user_stays_open(trained, tmp_path):
    with RunDirectory(tmp_path / "run") as run:
        analyze(trained.model, trained.x, run=run, limit=32)
        run.record("mine")
        assert [e["event"] for e in run.events()][-1] == "mine"


def test_json_comes_back_as_it_was(trained, tmp_path):
    pytest.importorskip("bokeh")
    found = analyze(trained.model, trained.x, out=tmp_path, limit=64)
    text = (tmp_path / "analysis.json").read_text()
    assert Analysis.model_validate_json(text) == found
    assert json.loads(text)["files"] == {"json": "analysis.json", "html": "analysis.html"}


def test_advice_names_techniques_that_exist(images, trained):
    known = bitwright.plugins.registry.techniques()
    uneven = conv_model(spread=0.001)
    found = analyze(uneven, images, target="htp_v66", weights="int4")
    named = {a.technique for a in found.advice if a.technique}
    assert "cross_layer_equalization" in named and named <= set(known)
    found = analyze(trained.model, trained.x, weights="int4", accumulator_bits=12)
    text = " ".join(a.text for a in found.advice)
    assert "adaround" in {a.technique for a in found.advice}
    assert "12-bit accumulator" in text
    after = QuantSim(trained.model, weights="int4").apply("adaround", trained.x).calibrate(trained.x)
    assert "adaround" not in {a.technique for a in analyze(after, trained.x).advice}
    unfolded = analyze(conv_model(), images, recipe=())
    assert "fold_batch_norm" in {a.technique for a in unfolded.advice}
    assert "fold_batch_norm" not in {a.technique for a in analyze(conv_model(), images).advice}


def test_an_evaluation_that_is_a_loss(trained):
    def loss(model):
        outputs = np.asarray(model({"features": trained.x})["scores"], np.float64)
        return float(-outputs[np.arange(len(outputs)), trained.labels].mean())

    found = analyze(trained.model, trained.x, loss, sweep_by="evaluate", larger_is_better=False, weights="int4")
    row = found.ranking()[0]
    assert row.harm == pytest.approx(row.alone - found.setting("float").score)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sweep_by": "guess"}, "'sqnr' or by 'evaluate'"),
        ({"sweep_by": "evaluate"}, "needs `evaluate` or `labels`"),
        ({"directions": ("sideways",)}, "'alone', 'without' or both"),
        ({"accumulator_bits": 4}, "8 to 64 bits"),
        ({"labels": np.zeros(3, int)}, "3 labels for [0-9]+ samples"),
        ({"labels": np.zeros((64, 2), int)}, r"shape \(samples,\), got \(64, 2\)"),
        ({"labels": np.full(64, 0.5)}, "got float64"),
        ({"sweep_samples": 0}, "at least one"),
        ({"evaluate": lambda model: "good"}, "must return one number"),
        ({"evaluate": lambda model: float("nan")}, "finite"),
        ({"target": {"nonsense": 1}}, "key is mandatory"),
    ],
)
def test_bad_arguments_are_named(trained, options, message):
    evaluate = options.pop("evaluate", None)
    with pytest.raises(ValueError, match=message):
        analyze(trained.model, trained.x, evaluate, **options)


def test_options_of_a_model_don_t_go_with_a_simulation(trained):
    with pytest.raises(InputError, match="weights: a QuantSim has these already"):
        analyze(QuantSim(trained.model), trained.x, weights="int4")


def test_a_target_that_quantizes_nothing_is_refused(trained):
    with pytest.raises(InputError, match="nothing to analyse"):
        overrides = dict.fromkeys(("fc1", "fc2", "fc3", "fc4", "features", "relu1", "relu2", "relu3"), "float")
        analyze(trained.model, trained.x, overrides=overrides)


def test_failing_leaves_no_folder_of_results(trained, tmp_path):
    pytest.importorskip("bokeh")
    with pytest.raises(InputError):
        analyze(trained.model, trained.x, lambda model: None, out=tmp_path / "out")
    assert not (tmp_path / "out" / "analysis.json").exists()


def test_a_page_without_bokeh_is_refused_before_work(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(analyzer, "opened", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(ImportError, match=r"bitwright\[report\]"):
        analyze(trained.model, trained.x, out=tmp_path)


@pytest.mark.filterwarnings("ignore:.*batches of exactly 12")
def test_models_that_fix_the_batch_size_are_fed_whole_batches(trained, tmp_path):
    model = onnx.ModelProto()
    model.CopyFrom(trained.model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 12
    x, labels = trained.x[:40], trained.labels[:40]
    found = analyze(model, x, labels=labels, sweep_samples=20)
    assert (
        found.overall[0].score == analyze(trained.model, x[:36], labels=labels[:36], sweep_samples=24).overall[0].score
    )
    assert bitwright.layer_outputs(model, x, tmp_path / "dump", limit=4).index.samples == 12
    limited = analyze(trained.model, x, labels=labels, limit=30)
    assert limited.overall[0].score == analyze(trained.model, x[:30], labels=labels[:30]).overall[0].score


@pytest.mark.parametrize(("sqnr", "told"), [(31.0, False), (20.0, True)])
def test_where_it_breaks_is_told_only_where_it_does_harm(sqnr, told):
    """Or the advice would be to export what it says is broken."""
    error = LayerError(
        tensor="y", op="fc", type="Gemm", mse=1, sqnr_db=17, max_error=1, shift=0, input_db=47, lost_db=30
    )
    overall = {"quantized": Overall(setting="quantized", sqnr_db=sqnr)}
    graph = QuantSim(conv_model()).graph
    evidence = Evidence(graph, overall, [], [error], [], [], [], [], 32, [], [])
    texts = " ".join(a.text for a in advice(evidence))
    assert ("falls most at fc" in texts and "--override fc=float" in texts) is told
    assert ("Export it" in texts) is not told


def test_a_top_1_of_guessing_is_remarked_on(images):
    data = np.concatenate([images, images[::-1]])
    found = analyze(conv_model(), data, labels=np.arange(len(data)) % 5)
    assert found.setting("float").score < 0.3
    assert "what guessing among 5 classes gives" in found.advice[0].text
