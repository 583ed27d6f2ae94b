"""What is captured equals what the user wrote: outputs bit for bit, names, calling, modes, and state."""

import copy

import pytest

torch = pytest.importorskip("torch")

import nets  # noqa: E402
import numpy as np  # noqa: E402
from torch import nn  # noqa: E402

from bitwright.backend import Tap  # noqa: E402
from bitwright.errors import InputError, ModelError  # noqa: E402
from bitwright.graph import OpKind  # noqa: E402
from bitwright_torch import CaptureNotice  # noqa: E402
from bitwright_torch.backend import TorchBackend  # noqa: E402

BACKEND = TorchBackend()


def build(kind, *args):
    torch.manual_seed(0)
    return nets.settled(kind(*args))


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


SAMPLES = {
    nets.Residual: noise(3, 3, 8, 8),
    nets.Branches: noise(2, 3, 6, 6),
    nets.Mlp: noise(4, 10),
    nets.Attention: torch.randint(0, 20, (3, 5)),
    nets.Tied: torch.randint(0, 12, (3, 4)),
    nets.Overwriting: noise(4, 6),
}


@pytest.mark.parametrize("kind", SAMPLES, ids=lambda k: k.__name__)
def test_outputs_are_equal_at_any_batch_size(kind):
    module = build(kind)
    x = SAMPLES[kind]
    model = BACKEND.adopt(module, x)
    for batch in (x, x[:1], torch.cat([x, x, x[:1]])):
        for a, b in zip(torch.utils._pytree.tree_leaves(model(batch)), torch.utils._pytree.tree_leaves(module(batch)),
                        strict=True):  # fmt: skip
            assert torch.equal(a, b)
    assert list(model.state_dict()) == list(module.state_dict())
    for name, value in module.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_single_sample_gives_a_free_batch_too():
    module = build(nets.Residual)
    model = BACKEND.adopt(module, noise(1, 3, 8, 8))
    assert BACKEND.input_specs(model) == {"x": ((None, 3, 8, 8), "float32")}
    assert torch.equal(model(SAMPLES[nets.Residual]), module(SAMPLES[nets.Residual]))


def test_the_user_s_module_isn_t_changed():
    module = build(nets.Overwriting)
    module.train()
    before = copy.deepcopy(module.state_dict())
    model = BACKEND.adopt(module, SAMPLES[nets.Overwriting])
    assert module.training and model.training and model.fc.training
    model(SAMPLES[nets.Overwriting])
    with torch.no_grad():
        model.fc.weight.zero_()
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_in_place_ops_become_functional():
    graph = BACKEND.graph(BACKEND.adopt(build(nets.Overwriting), SAMPLES[nets.Overwriting]))
    assert not [op for op in graph if op.native.partition(".")[2].partition(".")[0].endswith("_")]
    model = BACKEND.adopt(build(nets.Overwriting), SAMPLES[nets.Overwriting])
    x = SAMPLES[nets.Overwriting].clone()
    fc = next(op for op in graph if op.kind is OpKind.LINEAR)
    found = BACKEND.session(model, [Tap(fc.output)]).run({"x": x})[Tap(fc.output)]
    assert torch.equal(torch.from_numpy(found), model.fc(x)), "a tap shows the value before it was overwritten"
    assert torch.equal(x, SAMPLES[nets.Overwriting])
    model(x)
    model(x)
    assert model.calls == 2, "a session leaves no trace"


def test_nested_arguments_and_results():
    module = build(nets.Nested)
    pair = (noise(3, 4), {"y": noise(3, 5)})
    model = BACKEND.adopt(module, {"pair": pair, "extra": noise(3, 1)})
    assert BACKEND.graph(model).inputs == ("pair.0", "pair.1.y", "extra")
    pair = (noise(5, 4), {"y": noise(5, 5)})
    found, expected = model(pair, extra=noise(5, 1)), module(pair, extra=noise(5, 1))
    assert torch.equal(found["sum"], expected["sum"]) and torch.equal(found["list"][0], expected["list"][0])
    assert found["list"][1:] == [None, "text"] and found["x"] is pair[0]
    assert torch.equal(model(pair, 2.0, extra=noise(5, 1))["sum"], expected["sum"])
    for arguments, message in [
        (((pair, 3.0), {"extra": noise(5, 1)}), "'scale' wasn't given"),
        (((pair,), {}), "'extra' is None, but the model was captured with a tensor"),
        (((pair[0],), {"extra": noise(5, 1)}), "another structure"),
        (((), {"extra": noise(5, 1)}), "can't be called like this"),
    ]:
        with pytest.raises(InputError, match=message):
            model(*arguments[0], **arguments[1])


def test_constants_in_the_arguments_are_checked():
    model = BACKEND.adopt(build(nets.Nested), ((noise(3, 4), {"y": noise(3, 5)}), 3.0))
    with pytest.raises(InputError, match=r"'scale' is 4.0, but the model was captured with 3.0"):
        model((noise(3, 4), {"y": noise(3, 5)}), 4.0)


def test_batch_norm_and_dropout_follow_train_and_eval():
    module, x = build(nets.Residual).train(), SAMPLES[nets.Residual]
    model = BACKEND.adopt(module, x)
    for mode in (True, False, True):
        module.train(mode)
        model.train(mode)
        torch.manual_seed(3)
        expected = module(x)
        torch.manual_seed(3)
        assert torch.equal(model(x), expected)
        for name, value in module.named_buffers():
            assert torch.equal(model.get_buffer(name), value), name
    assert model.bn.num_batches_tracked == 2
    model.bn.eval()
    before = model.bn.running_mean.clone()
    model(x)
    assert torch.equal(model.bn.running_mean, before), "a single frozen batch norm stays frozen"
    assert isinstance(model.bn, nn.BatchNorm2d)


def test_a_captured_model_trains_as_the_original():
    module, x = build(nets.Residual).train(), SAMPLES[nets.Residual]
    model = BACKEND.adopt(module, x)
    for m in (module, model):
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for name, parameter in module.named_parameters():
        assert torch.allclose(model.get_parameter(name), parameter, atol=1e-6), name


def test_copies_are_independent():
    model = BACKEND.adopt(build(nets.Tied), SAMPLES[nets.Tied])
    clone = copy.deepcopy(model)
    assert clone.head.weight is clone.embed.weight
    with torch.no_grad():
        clone.head.weight.zero_()
    assert not torch.equal(model(SAMPLES[nets.Tied]), clone(SAMPLES[nets.Tied]))
    assert model.double()(SAMPLES[nets.Tied]).dtype == torch.float64


def test_names_are_the_user_s():
    graph = BACKEND.graph(BACKEND.adopt(build(nets.Residual), SAMPLES[nets.Residual]))
    ids = [op.id for op in graph]
    assert ids == ["stem.0", "stem.1", "stem.2", "depthwise", "bn", "relu", "pointwise", "add", "relu#1",
                   "adaptive_avg_pool2d", "flatten", "drop", "fc"]  # fmt: skip
    assert graph.op("add").source and "nets.py" in graph.op("add").source and "z += y" in graph.op("add").source
    assert "nets.py" in graph.op("stem.0").source
    assert [op.type for op in graph] == ["Conv", "BatchNormalization", "Clip", "Conv", "BatchNormalization", "Relu",
                                         "Conv", "Add", "Relu", "GlobalAveragePool", "Flatten", "Dropout",
                                         "Gemm"]  # fmt: skip
    assert graph.op("stem.2").kind is OpKind.CLIPPED_RELU and graph.op("relu#1").kind is OpKind.RELU


def test_shared_weights_and_reused_layers():
    graph = BACKEND.graph(BACKEND.adopt(build(nets.Tied), SAMPLES[nets.Tied]))
    assert graph.op("embed").weight == graph.op("head").weight == "embed.weight"
    assert graph.op("layer").weight == graph.op("layer#1").weight == "layer.weight"


def test_attention_is_shown_spelled_out_and_runs_fused():
    module = build(nets.Attention)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    ids = SAMPLES[nets.Attention]
    model = BACKEND.adopt(module, {"ids": ids, "mask": mask})
    assert torch.equal(model(ids, mask), module(ids, mask))
    graph = BACKEND.graph(model)
    name = "scaled_dot_product_attention"
    assert [op.type for op in graph if op.id.startswith(name)] == ["Mul", "Transpose", "MatMul", "Softmax", "MatMul"]
    inner = Tap(f"{name}.weights.output")
    found = BACKEND.session(model, [inner, Tap(graph.outputs[0])]).run({"ids": ids, "mask": mask})
    weights = found[inner]
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (weights[0, :, :, 3:] == 0).all() and np.isfinite(weights).all()
    np.testing.assert_allclose(found[Tap(graph.outputs[0])], module(ids, mask).detach(), atol=1e-6)
    scores = BACKEND.session(model, [Tap(f"{name}.scores.output", "minmax")]).run({"ids": ids, "mask": mask})
    assert np.isfinite(next(iter(scores.values()))).all(), "the mask's infinity is not a value of a tensor"


def test_parts_of_a_matrix_are_parameters():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = noise(2, 3, 8)
    model = BACKEND.adopt(module, (x, x.clone(), x.clone()))
    graph = BACKEND.graph(model)
    thirds = [op.weight for op in graph.linear_ops]
    assert thirds == [*(f"in_proj_weight.chunk(3)[{i}]" for i in range(3)), "out_proj.weight"]
    values = BACKEND.read(model, thirds[:3])
    np.testing.assert_array_equal(np.concatenate([values[t] for t in thirds[:3]]), module.in_proj_weight.detach())
    from bitwright.graph import SetParams

    changed = BACKEND.edit(model, [SetParams({thirds[1]: values[thirds[1]] + 1})])
    difference = changed.in_proj_weight - module.in_proj_weight
    assert (difference[8:16] == 1).all() or torch.allclose(difference[8:16], torch.ones(8, 8))
    assert (difference[:8] == 0).all() and (difference[16:] == 0).all()
    assert torch.equal(model.in_proj_weight, module.in_proj_weight)


def test_all_that_the_package_names_is_there():
    import bitwright_torch

    for name in bitwright_torch.__all__:
        # Not the folder of that name, though every module of the backend is loaded.
        assert callable(getattr(bitwright_torch, name)) and getattr(bitwright_torch, name).__doc__, name


def test_free_dimensions_can_be_asked_for():
    module = build(nets.Attention)
    from bitwright_torch import capture

    model = capture(module, SAMPLES[nets.Attention], dynamic_shapes={"ids": (0, 1)})
    assert BACKEND.input_specs(model) == {"ids": ((None, None), "int64")}
    other = torch.randint(0, 20, (2, 9))
    assert torch.equal(model(other), module(other))


def test_a_fixed_batch_is_told():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, 3) * 2

    with pytest.warns(CaptureNotice, match="fixed input shapes.*code fixes it"):
        model = BACKEND.adopt(Fixed(), noise(2, 3))
    with pytest.raises(InputError, match=r"input 'x' takes shape \[2, 3\]"):
        BACKEND.session(model, [Tap("x"), Tap(BACKEND.graph(model).outputs[0])]).run({"x": noise(4, 3)})


def test_segments_take_sizes_from_what_they_are_fed():
    module = build(nets.Attention)
    model = BACKEND.adopt(module, SAMPLES[nets.Attention])
    graph = BACKEND.graph(model)
    start, end = graph.op("qkv").data_inputs[0], graph.outputs[0]
    whole = BACKEND.session(model, [Tap(start), Tap(end)]).run({"ids": SAMPLES[nets.Attention]})
    part = BACKEND.segment(model, [start], [Tap(end)])
    np.testing.assert_allclose(part.run({start: whole[Tap(start)]})[Tap(end)], whole[Tap(end)], atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({}, InputError, "no array for input 'x'"),
        ({"x": np.zeros((2, 3, 8), np.float32)}, InputError, "takes shape"),
        ({"x": np.zeros((2, 3, 8, 8), np.complex64)}, InputError, "holds complex64 values"),
    ],
)
def test_wrong_batches_are_refused(batch, error, message):
    model = BACKEND.adopt(build(nets.Residual), SAMPLES[nets.Residual])
    session = BACKEND.session(model, [Tap(BACKEND.graph(model).outputs[0])])
    with pytest.raises(error, match=message):
        session.run(batch)


def test_wrong_samples_are_refused():
    with pytest.raises(InputError, match="needs a sample"):
        BACKEND.adopt(build(nets.Mlp))
    with pytest.raises(InputError, match=r"doesn't fit forward\(x\)"):
        BACKEND.adopt(build(nets.Mlp), (noise(2, 10), noise(2, 10)))
    with pytest.raises(ModelError, match=r"nets.py:\d+ in forward"):
        BACKEND.adopt(build(nets.Mlp), noise(2, 7))
    with pytest.raises(ModelError, match="no tensor 'nothing'"):
        BACKEND.session(BACKEND.adopt(build(nets.Mlp), noise(2, 10)), [Tap("nothing")])


def test_a_view_that_has_no_functional_form_names_the_line():
    class Hard(nn.Module):
        def forward(self, x):
            y = x * 2
            y.expand(3, -1, -1)[0].add_(1)
            return y

    with pytest.raises(ModelError, match=r"test_torch_capture.py:\d+ in forward: y.expand"):
        BACKEND.adopt(Hard(), noise(2, 3))


def test_lazy_layers_are_refused():
    with pytest.raises(ModelError, match="'weight' has no shape yet"):
        BACKEND.adopt(nn.LazyLinear(3), noise(2, 4))


def test_compiling_and_gradients():
    module, x = build(nets.Branches), SAMPLES[nets.Branches]
    model = BACKEND.adopt(module, x)
    inputs = x.clone().requires_grad_()
    model(inputs).sum().backward()
    other = x.clone().requires_grad_()
    module(other).sum().backward()
    assert torch.allclose(inputs.grad, other.grad, atol=1e-5)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(x), module(x))
