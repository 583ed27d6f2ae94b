"""What torch's exporter to ONNX doesn't take as it stands reaches the file: names and constants of other kinds."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from torch import nn  # noqa: E402

from bitwright.errors import ModelError  # noqa: E402
from bitwright.graph import ParamRole  # noqa: E402
from bitwright.placement import SharedWith  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import sqnr, verify  # noqa: E402
from bitwright_torch.capture.capturing import CaptureNotice  # noqa: E402
from bitwright_torch.export.spelling import refuse_invalid  # noqa: E402

X = torch.linspace(-2, 3, 24).reshape(4, 6)


class Function(nn.Module):
    """A function of the input and of a parameter."""

    def __init__(self, function, *shape: int) -> None:
        super().__init__()
        self.function = function
        self.p = nn.Parameter(torch.linspace(-4, 1, int(np.prod(shape))).reshape(shape)) if shape else None

    def forward(self, x):
        return self.function(x) if self.p is None else self.function(x, self.p)


def exported(folder, module: nn.Module):
    """The simulation, whose bundle is whole and whose float file computes what PyTorch does."""
    module.eval()
    sim = QuantSim(module, X).calibrate([X.numpy()])
    bundle = sim.export(folder)
    assert {"model", "qdq"} <= bundle.files.keys() and bundle.files["model"].suffix == ".onnx"
    session = ort.InferenceSession(str(bundle.files["model"]))
    found, expected = session.run(None, {session.get_inputs()[0].name: X.numpy()}), module(X)
    for a, b in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert np.allclose(a, b.detach().numpy(), atol=1e-5)
    assert verify(folder, [X.numpy()]).problems == []
    return sim


def positive(x):
    """How many values of each row are positive: whole numbers."""
    return (x > 0).sum(1, keepdim=True) + 1


@pytest.mark.parametrize("function", [
    lambda x: torch.divide(x, positive(x)), lambda x: torch.multiply(x, positive(x)),
    lambda x: torch.subtract(x, positive(x)), lambda x: torch.true_divide(x, positive(x)),
    lambda x: x - x.amin(), lambda x: x * x.amax(),
], ids=["divide", "multiply", "subtract", "true_divide", "amin", "amax"])  # fmt: skip
def test_second_names_and_extremes_of_all_values(tmp_path, function) -> None:
    sim = exported(tmp_path, Function(function))
    assert sqnr(function(X).numpy(), sim.predict([X.numpy()])[0]) > 30


@pytest.mark.parametrize("parts", [lambda x: torch.chunk(x, 2), lambda x: torch.split(x, x.shape[0] // 2)])
def test_parts_of_a_batch_follow_its_size(tmp_path, parts) -> None:
    """torch's exporter makes a sequence of them, on which its optimizer breaks."""
    function = Function(lambda x: torch.cat(parts(torch.tanh(x))[::-1], 1))
    exported(tmp_path, function)
    six = torch.linspace(-1, 1, 36).reshape(6, 6)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    np.testing.assert_allclose(session.run(None, {"x": six.numpy()})[0], function(six).numpy(), atol=1e-6)


@pytest.mark.parametrize("power", [0, 2])
def test_powers_of_matrices(tmp_path, power: int) -> None:
    """Of the zeroth the layers before it aren't used: their biases are in no file."""

    class Powers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 9)

        def forward(self, x):
            return torch.linalg.matrix_power(self.linear(x).reshape(-1, 3, 3), power)

    torch.manual_seed(0)
    sim = exported(tmp_path, Powers())
    if power == 0:
        assert np.array_equal(sim.predict([X.numpy()])[0], np.broadcast_to(np.eye(3), (4, 3, 3)))


def test_a_model_that_computes_nothing_is_a_model(tmp_path) -> None:
    exported(tmp_path, Function(lambda x: x.contiguous()))


def test_a_joined_parameter_is_stored_on_the_grid_of_the_result(tmp_path) -> None:
    sim = exported(tmp_path, Function(lambda x, p: torch.cat([torch.sigmoid(x), p]), 2, 6))
    (op,) = (op for op in sim.graph if op.type == "Concat")
    assert op.params == {ParamRole.CONSTANT: "p"} and sim.plan["p"].decision == SharedWith(op.output)


def test_what_is_written_into_a_tensor_stays_in_float_and_is_rounded_with_it(tmp_path) -> None:
    rows = torch.tensor([2, 0])
    sim = exported(tmp_path, Function(lambda x, p: torch.index_put(torch.tanh(x), (rows,), p), 2, 6))
    (op,) = (op for op in sim.graph if op.type == "ScatterND")
    assert op.params == {} and "p" not in sim.plan
    found = sim.predict([X.numpy()])[0]
    assert np.array_equal(found[2], sim.table[op.output].fake_quantize(np.linspace(-4, 1, 12, dtype=np.float32)[:6]))


def test_as_many_parts_as_the_sample_has() -> None:
    """Twice the sample would be split into five parts, of which its own size has three."""
    sample = torch.linspace(-1, 1, 15).reshape(5, 3)
    with pytest.warns(CaptureNotice, match="fixed input shapes"):
        sim = QuantSim(Function(lambda x: torch.split(x, 2)).eval(), sample)
    found = sim.predict([sample.numpy()], simulated=False)
    assert [f.shape for f in found] == [(2, 3), (2, 3), (1, 3)]
    assert np.array_equal(np.concatenate(found), sample.numpy())


def divided(dtype: ir.DataType) -> ir.Model:
    x, n = (
        ir.Value(name=k, type=ir.TensorType(t), shape=ir.Shape([2]))
        for k, t in (("x", ir.DataType.FLOAT), ("n", dtype))
    )
    node = ir.node("Div", [x, n], name="ratio")
    node.outputs[0].name = "y"
    weight = ir.Value(name="w", const_value=ir.tensor(np.zeros(4096, np.float32), name="w"))
    graph = ir.Graph([x, n], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def test_a_model_whose_types_do_not_fit_is_refused() -> None:
    valid = divided(ir.DataType.FLOAT)
    refuse_invalid(valid)
    assert valid.graph.initializers["w"].const_value.numpy().shape == (4096,)  # lent, and there again
    with pytest.raises(ModelError, match=r"isn't valid ONNX.*ratio"):
        refuse_invalid(divided(ir.DataType.INT64))
