"""Sessions: taps, reductions, segments, bad batches."""

import gc
import json
import sys
from pathlib import Path

import builders as b
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.backend import Tap
from bitwright.errors import InputError, ModelError
from bitwright.graph import SetParams
from bitwright_onnx.backend import OnnxBackend
from bitwright_onnx.graph.collector import without_collection
from bitwright_onnx.simulate import session as sessions
from bitwright_onnx.simulate.session import OrtSession, compile_session

BACKEND = OnnxBackend()
CNN = BACKEND.adopt(b.small_cnn())


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_minmax_taps_equal_numpy(opset, axis):
    model = BACKEND.adopt(b.small_cnn(opset))
    names = ["x", "c1", "b1", "r2", "logits", "prob"]
    x = b.image(3, 3, 8, 8)
    whole = OrtSession(model, [Tap(n) for n in names]).run({"x": x})
    reduced = OrtSession(model, [Tap(n, "minmax", axis) for n in names]).run({"x": x})
    for n in names:
        value = whole[Tap(n)]
        axes = None if axis is None else tuple(i for i in range(value.ndim) if i != axis % value.ndim)
        want = np.stack([value.min(axis=axes), value.max(axis=axes)])
        got = reduced[Tap(n, "minmax", axis)]
        # Fused and unfused convolutions differ in the last bit.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        assert got.shape == want.shape


def test_one_tensor_tapped_in_several_ways():
    taps = [Tap("c1"), Tap("c1", "minmax"), Tap("c1", "minmax", 1), Tap("c1")]
    got = OrtSession(CNN, taps).run({"x": b.image(2, 3, 8, 8)})
    assert set(got) == set(taps)
    value = got[Tap("c1")]
    np.testing.assert_array_equal(got[Tap("c1", "minmax")], [value.min(), value.max()])
    np.testing.assert_array_equal(got[Tap("c1", "minmax", 1)][1], value.max(axis=(0, 2, 3)))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["c1", "b1", "r1", "c2", "r2", "sum", "flat"]), st.integers(1, 4))
def test_a_segment_fed_with_a_tensor_gives_what_the_whole_model_gives(cut, batch):
    x = b.image(batch, 3, 8, 8)
    taps = [Tap("prob"), Tap("logits")]
    feeds = [cut] if cut not in ("c2", "r2") else [cut, "r1"]
    first = OrtSession(CNN, [*map(Tap, feeds), *taps]).run({"x": x})
    part = BACKEND.segment(CNN, feeds, taps).run({f: first[Tap(f)] for f in feeds})
    for tap in taps:
        np.testing.assert_allclose(part[tap], first[tap], rtol=1e-5, atol=1e-6)


def test_a_segment_that_needs_more_says_what():
    with pytest.raises(ModelError, match=r"'prob'.*from 'r2' alone.*'x'"):
        BACKEND.segment(CNN, ["r2"], [Tap("prob")])


def test_a_segment_across_control_flow_counts_captures():
    model = BACKEND.adopt(b.control_flow())
    with pytest.raises(ModelError, match="can't be computed"):
        BACKEND.segment(model, ["flag"], [Tap("y")])
    session = BACKEND.segment(model, ["c", "flag"], [Tap("y")])
    c = b.image(2, 4, 4, 4)
    got = session.run({"c": c, "flag": np.array(False)})[Tap("y")]
    shift = BACKEND.read(model, ["shift"])["shift"]
    np.testing.assert_allclose(got, np.maximum(c * shift, 0), rtol=1e-6)


def test_feeds_are_tapped_as_given_and_unused_inputs_not_asked_for():
    m = b.ModelBuilder()
    m.input("a", ["N", 3])
    m.input("c", ["N", 3])
    m.node("Relu", ["a"], "ra")
    m.node("Add", ["ra", "c"], "y")
    m.output("y")
    model = BACKEND.adopt(m.build())
    session = OrtSession(model, [Tap("ra"), Tap("a")])
    assert session.needs == ("a",)
    a = b.image(2, 3)
    got = session.run({"a": a, "whatever": a})
    assert got[Tap("a")] is a and np.array_equal(got[Tap("ra")], np.maximum(a, 0))
    segment = BACKEND.segment(model, ["ra"], [Tap("ra", "minmax")])
    np.testing.assert_array_equal(segment.run({"ra": a})[Tap("ra", "minmax")], [a.min(), a.max()])


def test_bound_inputs_are_read_anew_at_each_run():
    m = b.ModelBuilder()
    m.input("x", ["N", 3])
    m.input("gain", [])
    m.node("Mul", ["x", "gain"], "y")
    m.output("y")
    bound = {"gain": np.float32(2)}
    session = OrtSession(BACKEND.adopt(m.build()), [Tap("y")], bound=bound)
    x = b.image(2, 3)
    assert session.needs == ("x",) and np.array_equal(session.run({"x": x})[Tap("y")], x * 2)
    bound["gain"] = np.float32(3)
    assert np.array_equal(session.run({"x": x})[Tap("y")], x * 3)


def test_the_dimensions_of_feeds_are_free():
    m = b.ModelBuilder()
    m.input("x", [1, 3, 4, 4])
    m.node("Relu", ["x"], "r")
    m.node("Sigmoid", ["r"], "y")
    m.output("y")
    session = BACKEND.segment(BACKEND.adopt(m.build()), ["r"], [Tap("y")])
    assert session.run({"r": b.image(5, 3, 4, 4)})[Tap("y")].shape == (5, 3, 4, 4)


def test_bad_batches():
    session = OrtSession(CNN, [Tap("prob")])
    with pytest.raises(InputError, match="no array for input 'x'; it holds z"):
        session.run({"z": b.image(1, 3, 8, 8)})
    with pytest.raises(InputError, match=r"input 'x' takes shape \[\?, 3, 8, 8\].*holds \[1, 4, 8, 8\]"):
        session.run({"x": b.image(1, 4, 8, 8)})
    with pytest.raises(InputError, match=r"input 'x' takes shape \[\?, 3, 8, 8\].*holds \[3, 8, 8\]"):
        session.run({"x": b.image(3, 8, 8)})
    with pytest.raises(InputError, match="input 'x': holds <U1 values; give numbers"):
        session.run({"x": np.full((1, 3, 8, 8), "a")})
    assert session.run({"x": b.image(1, 3, 8, 8).astype(np.float64)})[Tap("prob")].dtype == np.float32


def test_integers_are_not_taken_from_fractions():
    m = b.ModelBuilder()
    m.input("i", ["N"], b.INT64)
    m.node("Gather", [m.weight("t", 4, 2), "i"], "y")
    m.output("y")
    session = OrtSession(BACKEND.adopt(m.build()), [Tap("y")])
    assert session.run({"i": np.array([1, 2], np.int32)})[Tap("y")].shape == (2, 2)
    assert session.run({"i": np.array([1.0], np.float32)})[Tap("y")].shape == (1, 2)
    with pytest.raises(InputError, match="input 'i': the model takes int64, but the float32 values have fractions"):
        session.run({"i": np.array([1.5], np.float32)})
    with pytest.raises((InputError, ModelError), match="out of data bounds"):
        session.run({"i": np.array([7])})


def test_unknown_taps():
    with pytest.raises(ModelError, match="no tensor 'nope'"):
        OrtSession(CNN, [Tap("nope")])
    with pytest.raises(ModelError, match="no tensor 'nope'"):
        BACKEND.segment(CNN, ["nope"], [Tap("prob")])


def test_half_precision_is_reduced_in_float32():
    m = b.ModelBuilder()
    m.input("x", ["N", 3])
    m.node("Cast", ["x"], "h", to=10)
    m.node("Relu", ["h"], "r")
    m.node("Cast", ["r"], "y", to=1)
    m.output("y")
    x = b.image(4, 3)
    got = OrtSession(BACKEND.adopt(m.build()), [Tap("r", "minmax", 1)]).run({"x": x})[Tap("r", "minmax", 1)]
    # ONNX Runtime may drop the casts around an op, so that the result is more exact than half precision.
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[1], np.maximum(x, 0).max(axis=0), rtol=1e-3)


def test_threads_from_the_environment(monkeypatch):
    monkeypatch.setenv("BITWRIGHT_THREADS", "two")
    with pytest.raises(InputError, match="BITWRIGHT_THREADS='two'"):
        OrtSession(CNN, [Tap("prob")])


def test_the_model_is_not_changed_by_sessions():
    model = BACKEND.adopt(b.small_cnn())
    before = [v.const_value for v in model.graph.initializers.values()]
    OrtSession(model, [Tap("c1", "minmax"), Tap("prob")])
    BACKEND.segment(model, ["c1"], [Tap("prob")])
    assert [v.const_value for v in model.graph.initializers.values()] == before
    assert [v.name for v in model.graph.outputs] == ["prob"] and len(list(model.graph)) == 11


def test_an_error_that_is_handled_already_is_no_reason_that_a_model_cannot_be_written(monkeypatch):
    def too_large(part):
        raise ValueError("more than 2 GB")

    monkeypatch.setattr("bitwright_onnx.simulate.session.ir.to_proto", too_large)
    try:
        raise InputError("of something else")
    except InputError:
        with pytest.raises(ModelError, match=r"can't be serialized \(more than 2 GB\)"):
            compile_session(BACKEND.adopt(b.mlp()))


def test_graphs_are_copied_and_written_without_the_collector():
    """It would go through all that the process holds; it is on again afterwards, also where something fails."""
    model, copying = BACKEND.adopt(b.small_cnn()), []

    def called(phase, _):
        frame = sys._getframe()
        while frame is not None:
            copying.append(Path(frame.f_code.co_filename).name in ("_cloner.py", "serde.py"))
            frame = frame.f_back

    before, threshold = gc.isenabled(), gc.get_threshold()
    gc.callbacks.append(called)
    gc.set_threshold(5)
    try:
        gc.enable()
        changed = BACKEND.edit(
            model, [SetParams({"conv1.weight": BACKEND.read(model, ["conv1.weight"])["conv1.weight"] / 2})]
        )
        BACKEND.session(changed, [Tap("c1", "minmax")])
        assert copying
        assert not any(copying)
        with pytest.raises(ModelError), without_collection():
            BACKEND.session(changed, [Tap("nothing")])
        assert gc.isenabled()
        gc.disable()
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.callbacks.remove(called)
        gc.set_threshold(*threshold)
        gc.enable() if before else gc.disable()


@pytest.mark.parametrize("thinned", [False, True])
def test_taps_run_soon_behind_their_tensors(thinned, monkeypatch, tmp_path):
    """So that these are let go before those of later layers come; a session of few runs makes no plan for memory."""
    m = b.ModelBuilder()
    m.input("x", ["n", 16, 8, 8])
    m.output("y", ["n", 16])
    for i in range(8):
        m.node("Conv", [f"r{i - 1}" if i else "x", m.weight(f"w{i}", 16, 16, 3, 3)], f"c{i}", pads=[1] * 4)
        m.node("Relu", [f"c{i}"], f"r{i}")
    m.node("GlobalAveragePool", ["r7"], "pool")
    m.node("Flatten", ["pool"], "y")
    made = sessions.session_options

    def profiled(config=None):
        options = made(config)
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "run")
        return options

    monkeypatch.setattr(sessions, "session_options", profiled)
    taps = [Tap(f"r{i}", axis=1, step=3) if thinned else Tap(f"r{i}", "minmax") for i in range(7)] + [Tap("r7")]
    session = OrtSession(BACKEND.adopt(m.build()), taps)
    found = session.run({"x": b.image(1, 16, 8, 8)})
    assert found[taps[-1]].shape == (1, 16, 8, 8)
    assert found[taps[0]].shape == ((1, 342) if thinned else (2,))
    assert not session._session.get_session_options().enable_mem_pattern
    events = json.loads(Path(session._session.end_profiling()).read_text())
    run = [e["args"]["op_name"] for e in sorted(events, key=lambda e: e["ts"]) if e["name"].endswith("_kernel_time")]
    work = [op for op in run if op in ("Conv", "GlobalMaxPool", "Slice")]
    assert work == ["Conv", "Slice" if thinned else "GlobalMaxPool"] * 7 + ["Conv"]


def test_threads_do_not_wait_busily_between_runs():
    """For a core that products of matrices are computed on then: of a layer walk a quarter of the time."""
    taken = compile_session(CNN).get_session_options()
    assert taken.get_session_config_entry("session.force_spinning_stop") == "1"
    both = sessions.session_options({"session.force_spinning_stop": "0", "session.disable_quant_qdq": "1"})
    assert both.get_session_config_entry("session.force_spinning_stop") == "0"  # as a caller wants it
