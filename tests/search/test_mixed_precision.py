"""mixed_precision on a small network: groups, costs, goals, resuming, what it writes."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from search_net import build

from bitwright import QuantSim, RunDirectory, mixed_precision
from bitwright.errors import InputError
from bitwright_search.candidates import group_sites, read_candidates
from bitwright_search.costs import CostModel, multiply_accumulates
from bitwright_search.latency_measure import measure_latency
from bitwright_search.sensitivity import first_samples, measure_noise

pytest.importorskip("scipy")

W48 = [("int8", "uint8"), ("int4", "uint8")]
MACS = {"stem": 144 * 8 * 27, "dw": 25 * 8 * 9, "mix": 25 * 8 * 8, "res": 25 * 8 * 72, "fc": 40}
"""Multiply-accumulates by hand: output positions × output channels × products."""


@pytest.fixture(scope="module")
def folded(net):
    sim = QuantSim(net.model, weight_scheme="mse")
    return sim.apply("fold_batch_norm")


def sites(groups):
    return [{*g.weights, *g.activations} for g in groups]


def test_groups_of_weights_alone(folded):
    groups, notes = group_sites(folded, read_candidates(W48))
    assert sites(groups) == [{"stem.weight"}, {"dw.weight"}, {"mix.weight"}, {"res.weight"}, {"fc.weight"}]
    assert not notes


def test_what_an_op_reads_is_one_group_with_its_weight(folded):
    groups, _ = group_sites(folded, read_candidates([("int8", "uint16"), ("int8", "uint8")]))
    found = sites(groups)
    assert {"image", "stem.weight"} in found
    # The addition reads both, and the convolution one of them.
    assert {"mix_out", "res_out", "res.weight"} in found
    assert {"pool_out", "fc.weight"} in found
    everything = [s for group in found for s in group]
    assert len(everything) == len(set(everything))
    (residual,) = [g for g in groups if "res_out" in g.activations]
    assert residual.name == "res"
    (head,) = [g for g in groups if "fc.weight" in g.weights]
    types = head.types(folded, read_candidates(W48)[0])
    assert types == {"fc.weight": "int8", "pool_out": "uint8", "flat_out": "uint8"}


@pytest.mark.parametrize("made", [False, True])
def test_activations_that_all_candidates_share_are_those_of_the_network(net, made):
    """A simulation of uint8 gets them too, as far as an op reads them."""
    candidates = [("int8", "uint16"), ("int4", "uint16")]
    model = QuantSim(net.model).apply("fold_batch_norm") if made else net.model
    result = mixed_precision(model, net.images, candidates=candidates, lite=40)
    assert set(result.assignment.values()) == {"int8 × uint16", "int4 × uint16"}
    bits = {s: result.sim.plan.spec(s).bits for s in result.sim.plan.activations}
    assert {b for s, b in bits.items() if s not in result.sim.graph.outputs} == {16}
    if not made:
        assert result.reference_cost == 8 * 16 * sum(MACS.values())
    table = measure_latency(model, net.images, candidates=candidates, samples=1, repeats=1)
    assert {(e.weights, e.activations) for e in table.entries if e.op == "fc"} == {(8, 16), (4, 16)}


def test_kernels_limit_the_candidates(net):
    wide, narrow = ({"activation": {"bitwidth": a, "dtype": "int"}, "param": {"bitwidth": 8, "dtype": "int"}}
                    for a in (16, 8))  # fmt: skip
    target = {
        "defaults": {"ops": {"is_output_quantized": "True"}, "params": {"is_quantized": "True"},
                     "supported_kernels": [wide, narrow]},
        "params": {}, "op_type": {"Gemm": {"supported_kernels": [narrow]}}, "supergroups": [],
        "model_input": {"is_input_quantized": "True"}, "model_output": {},
    }  # fmt: skip
    sim = QuantSim(net.model, target=target)
    groups, notes = group_sites(sim, read_candidates([("int8", "uint16"), ("int8", "uint8"), ("int4", "uint8")]))
    allowed = {g.name: g.allowed for g in groups}
    assert allowed["stem"] == (0, 1)
    assert allowed["fc"] == (1,)
    _, notes = group_sites(sim, read_candidates([("int8", "uint16"), ("int4", "uint16")]))
    assert any(note.startswith("fc: the target has a kernel for none") for note in notes)


@pytest.mark.parametrize("size", [12, "h"])
def test_costs_by_hand(net, size):
    """With free image sizes, shapes are seen in a batch."""
    sim = QuantSim(build(size=size)).apply("fold_batch_norm")
    macs = multiply_accumulates(sim, {"image": net.images[:3]})
    assert {k: macs[k] for k in MACS} == MACS
    candidates = read_candidates(W48)
    groups, _ = group_sites(sim, candidates)
    costs = CostModel(sim, "bit_operations", macs, None).table(groups, candidates)
    assert costs.tolist() == [[m * 64, m * 32] for m in MACS.values()]
    costs = CostModel(sim, "weight_bytes", macs, None).table(groups, candidates)
    assert costs.tolist() == [[216, 108], [72, 36], [64, 32], [576, 288], [40, 20]]


def test_costs_of_products_with_shapes_that_only_a_batch_tells():
    """A product of two activations of free sizes, and a transposed convolution of a fed image of free size."""
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    weight = np.random.default_rng(0).normal(size=(3, 4, 2, 2)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [node("MatMul", ["a", "b"], ["y"], "product"), node("ConvTranspose", ["x", "w"], ["z"], "up", strides=[2, 2])],
        "net",
        [info(n, onnx.TensorProto.FLOAT, s) for n, s in
         (("a", ["n", "p", "k"]), ("b", ["n", "k", "q"]), ("x", ["n", 3, "h", "w"]))],
        [info("y", onnx.TensorProto.FLOAT, ["n", "p", "q"]), info("z", onnx.TensorProto.FLOAT, ["n", 4, None, None])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    shapes = {"a": (2, 5, 7), "b": (2, 7, 3), "x": (2, 3, 6, 6)}
    batch = {n: np.ones(s, np.float32) for n, s in shapes.items()}
    macs = multiply_accumulates(QuantSim(model), batch)
    assert macs == {"product": 5 * 7 * 3, "up": 3 * 6 * 6 * 4 * 2 * 2}


def test_noise_is_that_of_one_group_alone_and_no_matter_of_the_batch_size(folded, net, tmp_path):
    candidates = read_candidates(W48)
    groups, _ = group_sites(folded, candidates)
    found = []
    for size in (5, 16):
        data = folded.open(net.images, batch_size=size)
        with RunDirectory(tmp_path / str(size)) as run:
            batches = first_samples(data, 20)
            assert sum(len(b["image"]) for b in batches) == 20
            found.append(measure_noise(folded, groups, candidates, data, batches, run))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)
    assert (found[0][:, 1] > found[0][:, 0]).all()
    twin = QuantSim(net.model, overrides={"res.weight": "int4"}, weight_scheme="mse").apply("fold_batch_norm")
    twin.calibrate(net.images)
    simulation = twin.backend.simulate(twin.native, twin.plan, twin.table)
    simulation.set({twin.plan.root(s): None for s in twin.plan.quantized if s != "res.weight"})
    exact = twin.predict(net.images[:20], simulated=False)[0]
    noisy = simulation.model({"image": net.images[:20]})["scores"]
    noise = np.square(noisy - exact, dtype=np.float64).sum() / np.square(exact, dtype=np.float64).sum()
    assert found[0][3, 1] == pytest.approx(noise, rel=1e-3)


@pytest.fixture(scope="module")
def mixed(net):
    return mixed_precision(net.model, net.images, net.fidelity, candidates=W48, allowed_drop=0.2)


def test_the_cheapest_within_the_drop(mixed, net):
    assert mixed.met
    assert mixed.score >= mixed.float_score - 0.2
    assert mixed.score == net.fidelity(mixed.model)
    assert mixed.relative_cost < 1
    assert set(mixed.assignment.values()) == {"int8 × uint8", "int4 × uint8"}
    bits = {r.site: r.bits for r in mixed.sim.plan.table()}
    for group, types in mixed.assignment.items():
        assert bits[f"{group}.weight"] == types.split()[0]
    assert mixed.cost == sum(m * 8 * (4 if "int4" in mixed.assignment[g] else 8) for g, m in MACS.items())
    assert mixed.reference_cost == 64 * sum(MACS.values())


def test_fronts_are_monotone(mixed):
    assert all(
        a.cost < b.cost and a.predicted_sqnr_db < b.predicted_sqnr_db for a, b in itertools.pairwise(mixed.front)
    )
    assert all(a.cost < b.cost and a.score < b.score for a, b in itertools.pairwise(mixed.measured))
    assert mixed.front[0].relative_cost == 0.5
    assert mixed.front[-1].relative_cost == 1.0


def test_a_goal_beyond_reach_gives_the_best(net):
    result = mixed_precision(net.model, net.images, net.fidelity, candidates=W48, allowed_drop=0.0)
    assert not result.met
    assert result.score == max(p.score for p in result.measured)
    assert "not even the most precise" in result.notes[-1]


def test_a_goal_that_everything_meets_gives_the_cheapest(net):
    with pytest.warns(UserWarning, match="if the score is a share, every network keeps it"):
        result = mixed_precision(net.model, net.images, net.fidelity, candidates=W48, allowed_drop=10.0)
    assert result.met
    assert result.relative_cost == 0.5


@pytest.mark.parametrize("cost", ["bit_operations", "weight_bytes"])
def test_a_budget_and_the_exact_solver_against_greedy(net, cost):
    found = {
        solver: mixed_precision(net.model, net.images, candidates=W48, budget=0.7, cost=cost, solver=solver)
        for solver in ("exact", "greedy")
    }
    noise = {s: 10 ** (-next(p for p in r.front if p.assignment == r.assignment).predicted_sqnr_db / 10)
             if any(p.assignment == r.assignment for p in r.front) else np.inf for s, r in found.items()}  # fmt: skip
    for result in found.values():
        assert result.relative_cost <= 0.7
        assert result.met
        assert result.score is None
    assert noise["exact"] <= noise["greedy"]


def test_wider_activations_where_they_matter(net):
    result = mixed_precision(net.model, net.images, net.fidelity, allowed_drop=0.04,
                             candidates=[("int8", "uint16"), ("int8", "uint8")])  # fmt: skip
    assert result.met
    assert 0.5 < result.relative_cost < 1
    bits = {r.site: r.bits for r in result.sim.plan.table()}
    assert {"uint8", "uint16"} <= set(bits.values())


@pytest.mark.parametrize(("percent", "count"), [(0, 0), (1, 1), (40, 2), (100, 5)])
def test_lite_flips_the_most_sensitive(net, percent, count):
    result = mixed_precision(net.model, net.images, candidates=W48, lite=percent)
    low = {s.group: s.sqnr_db for s in result.sensitivities if s.candidate == "int4 × uint8"}
    flipped = [g for g, types in result.assignment.items() if types == "int8 × uint8"]
    assert set(flipped) == set(sorted(low, key=low.get)[:count])


def test_techniques_are_applied_to_what_is_evaluated(net):
    result = mixed_precision(net.model, net.images, net.fidelity, candidates=W48, lite=40, techniques="bias_correction")
    assert "bias_correction" in [name for name, _ in result.sim.reports]


def test_a_simulation_keeps_what_was_done_to_it(net):
    sim = QuantSim(net.model).apply("fold_batch_norm").apply("adaround", net.images[:16])
    before = dict(sim.encodings)
    result = mixed_precision(sim, net.images, candidates=W48, lite=40)
    assert dict(sim.encodings) == before
    for group, types in result.assignment.items():
        assert result.sim.encodings[f"{group}.weight"].frozen == (types == "int8 × uint8")


CALLS: list[int] = []
"""Not in a closure: what an evaluation holds is a part of it, and a new value makes it another one."""


def test_finished_work_is_not_done_again(net, tmp_path):
    CALLS.clear()

    def evaluate(model):
        CALLS.append(1)
        return net.fidelity(model)

    def run():
        return mixed_precision(net.model, net.images, evaluate, candidates=W48, allowed_drop=0.2, run=tmp_path / "r")

    first = run()
    count = len(CALLS)
    journal = (tmp_path / "r/journal.jsonl").read_text().count('"stage"')
    again = run()
    assert len(CALLS) == count
    assert (tmp_path / "r/journal.jsonl").read_text().count('"stage"') == journal
    assert again.front == first.front
    assert again.assignment == first.assignment


def test_what_it_writes(net, tmp_path):
    result = mixed_precision(net.model, net.images, net.data, candidates=W48, allowed_drop=0.2, out=tmp_path / "o")
    names = {p.name for p in (tmp_path / "o").iterdir()}
    assert names == {"net.onnx", "net.encodings", "net.qdq.onnx", "net.record.npz", "report.json", "report.html",
                     ".run", "mixed_precision.json", "mixed_precision.html"}  # fmt: skip
    told = json.loads((tmp_path / "o/mixed_precision.json").read_text())
    assert told["assignment"] == result.assignment
    assert [p["cost"] for p in told["front"]] == [p.cost for p in result.front]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a goal"),
        ({"allowed_drop": 0.1}, "allowed_drop needs evaluate"),
        ({"budget": 0.5, "lite": 10}, "lite decides by itself"),
        ({"budget": 1.5}, "a share of the reference's cost"),
        ({"budget": 0.3}, "budget=0.3 of the reference.* cheapest assignment, 0.5 of it"),
        ({"lite": 101}, "a percentage"),
        ({"lite": 10, "candidates": [("int8", "uint8")]}, "at least two different candidates"),
        ({"lite": 10, "candidates": ["int8", "int4"]}, "give a pair of types"),
        ({"lite": 10, "candidates": [("int8", "uint8"), ("int1", "uint8")]}, "2 to 16 bits"),
        ({"lite": 10, "candidates": [("int8", "uint8"), ("int4", "int4:block32")]}, "blocks are for weights"),
        ({"lite": 10, "solver": "magic"}, "choose exact or greedy"),
        ({"lite": 10, "cost": "energy"}, "choose bit_operations, weight_bytes or latency"),
        ({"lite": 10, "cost": "latency"}, "needs latency="),
        ({"lite": 10, "latency": {"entries": []}}, "entries"),
        ({"lite": 10, "sensitivity_samples": 0}, "at least one sample"),
    ],
)
def test_bad_arguments(net, arguments, message):
    with pytest.raises(InputError, match=message):
        mixed_precision(net.model, net.images, **{"candidates": W48, **arguments})


def test_the_command(net, capsys, tmp_path):
    from bitwright.cli import main

    common = ["mixed-precision", net.model, "--data", net.folder / "images.npy", "--out", tmp_path / "out", "--quiet",
              "--candidates", "int8/uint8,int4/uint8"]  # fmt: skip

    def run(*words):
        status = main([str(w) for w in (*common, *words)])
        return status, *capsys.readouterr()

    status, out, _ = run("--labels", net.folder / "labels.npy", "--allowed-drop", "0.2")
    assert status == 0
    assert "% of the reference's bit operations" in out
    assert run("--budget", "0.9", "--measure", "--override", "fc=float")[0] == 0
    assert run("--budget", "0.9", "--measure")[0] == 0
    assert (tmp_path / "out/latency.json").exists()
    # What was measured on a busy machine may know no network that is faster: all that it asks for is the reference.
    assert run("--budget", "1", "--cost", "latency", "--latency", tmp_path / "out/latency.json")[0] == 0
    assert run()[0] == 2
    assert run("--allowed-drop", "0.1")[0] == 2


def test_sensitivities_on_workers_are_those_of_one_process(net, folded):
    """The networks travel as paths; what each group adds is the same to the bit."""
    options = {"candidates": W48, "budget": 0.8, "sensitivity_samples": 8}
    straight = mixed_precision(folded, net.images, **options)
    with ThreadPoolExecutor(2) as pool:
        assert mixed_precision(folded, net.images, executor=pool, **options).sensitivities == straight.sensitivities
    found = mixed_precision(folded, net.images, executor=2, **options)
    assert found.sensitivities == straight.sensitivities
    assert found.assignment == straight.assignment
    assert found.sim.workers is None


def test_what_is_measured_on_workers_is_stored(net, folded, tmp_path, monkeypatch):
    """A search that ends in the middle goes on from what its workers have measured, and leaves no network behind."""
    from bitwright_search import sensitivity

    options = {"candidates": W48, "budget": 0.8, "sensitivity_samples": 8, "run": tmp_path}
    measured, noise_of = [], sensitivity.noise_of

    def failing(folder, sites):
        measured.append(sites)
        if len(measured) == 4:
            raise InputError("in the middle")
        return noise_of(folder, sites)

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(sensitivity, "noise_of", failing)
        with pytest.raises(InputError, match="in the middle"):
            mixed_precision(folded, net.images, executor=pool, **options)
        found = mixed_precision(folded, net.images, executor=pool, **options)
    # Three were stored; with the one that failed, each but those is measured in the second search.
    assert len(measured) == 4 + len(W48) * 5 - 3
    assert not list(tmp_path.rglob(sensitivity.NETWORK))
    assert found.sensitivities == mixed_precision(folded, net.images, **{**options, "run": None}).sensitivities
