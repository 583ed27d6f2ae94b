"""Opening, normalizing and writing models."""

import contextlib
import io
import os
from pathlib import Path

import builders as b
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data

from bitwright.backend import Tap
from bitwright.errors import InputError, ModelError
from bitwright.files import HeldFile
from bitwright.graph import ParamRole
from bitwright.placement import Float
from bitwright.simulation import QuantSim
from bitwright.verify import sqnr
from bitwright_onnx.backend import OnnxBackend
from bitwright_onnx.capture import reading, writing
from bitwright_onnx.graph.opset import opset_of, raise_opset
from bitwright_onnx.graph.stored import StoredTensor, stored_tensor
from bitwright_onnx.graph.subgraph import values_of
from bitwright_onnx.simulate.session import OrtSession, compile_session

BACKEND = OnnxBackend()


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return compile_session(model).run(None, feeds)


def assert_same(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> ir.Model:
    before = proto.SerializeToString()
    model = BACKEND.adopt(proto)
    for got, want in zip(outputs(model, feeds), b.run(proto, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert proto.SerializeToString() == before
    return model


@pytest.mark.parametrize("opset", range(9, 24))
def test_every_opset_is_opened_with_equal_outputs_and_names(opset):
    proto = b.small_cnn(opset)
    model = assert_same(proto, {"x": b.image(2, 3, 8, 8)})
    assert opset_of(model) == max(opset, 13)
    assert {o for n in proto.graph.node for o in n.output} <= set(values_of(model.graph))
    assert [n.name for n in proto.graph.node if n.op_type != "Constant"] == [
        n.name for n in model.graph if n.op_type != "Constant" and n.name in {m.name for m in proto.graph.node}
    ]


def test_opset_9_spellings_and_initializers_listed_as_inputs():
    model = assert_same(b.old_style(), {"x": b.image(2, 3, 8, 8)})
    assert [v.name for v in model.graph.inputs] == ["x"]
    # The converter replaces Upsample by a node with new names; they are put back.
    assert values_of(model.graph)["u"].producer().name == "up"
    assert {"c", "r6", "u", "s", "p", "d", "g", "sq", "us", "rs", "s1", "s2", "cc", "y"} <= set(values_of(model.graph))


def test_raising_to_int4_opset_shares_weights_and_keeps_names():
    model = BACKEND.adopt(b.small_cnn(13))
    raised = raise_opset(model, 21)
    assert (opset_of(model), opset_of(raised)) == (13, 21)
    x = b.image(2, 3, 8, 8)
    np.testing.assert_allclose(outputs(raised, {"x": x})[0], outputs(model, {"x": x})[0], rtol=1e-6)
    big = "conv1.weight" if model.graph.initializers["conv1.weight"].const_value.nbytes > 1024 else None
    assert big is None or raised.graph.initializers[big].const_value is model.graph.initializers[big].const_value
    assert {n.name for n in model.graph} <= {n.name for n in raised.graph}


def test_an_opset_that_cannot_be_converted_is_a_clear_error():
    m = b.ModelBuilder(6)
    m.input("x", [1, 3])
    m.node("Dropout", ["x"], "y", is_test=0)
    m.output("y", [1, 3])
    with pytest.raises(ModelError, match=r"opset 6 .*Export it with opset 13 or newer"):
        BACKEND.adopt(m.build())


def test_unnamed_and_duplicate_node_names_become_unique():
    m = b.ModelBuilder()
    m.input("x", ["N", 4])
    m.node("Relu", ["x"], "a", "")
    m.node("Sigmoid", ["a"], "c", "same")
    m.node("Tanh", ["c"], "d", "same")
    m.node("Neg", ["d"], "y", "")
    m.output("y")
    names = [n.name for n in BACKEND.adopt(m.build()).graph]
    assert names[0] == "a" and names[1] == "same" and len(set(names)) == 4


def test_constants_identities_and_reshaped_weights_become_plain_initializers():
    m = b.ModelBuilder()
    m.input("x", ["N", 4])
    m.node("Identity", [m.weight("fc.weight", 6, 4)], "w_alias")
    m.node("Transpose", ["w_alias"], "w_t", perm=[1, 0])
    m.node("MatMul", ["x", "w_t"], "h")
    m.node("Constant", [], "half", value=numpy_helper.from_array(np.full(6, 0.5, np.float32)))
    m.node("Identity", ["h"], "h_alias")
    m.node("Mul", ["h_alias", "half"], "y")
    m.output("y")
    model = assert_same(m.build(), {"x": b.image(3, 4)})
    assert [n.op_type for n in model.graph] == ["MatMul", "Mul"]
    assert set(model.graph.initializers) == {"fc.weight", "half"}


def test_a_shared_transposed_weight_keeps_both_forms():
    m = b.ModelBuilder()
    m.input("x", ["N", 4])
    m.node("Transpose", [m.weight("w", 4, 4)], "w_t", perm=[1, 0])
    m.node("MatMul", ["x", "w"], "h")
    m.node("MatMul", ["h", "w_t"], "y")
    m.output("y")
    assert set(assert_same(m.build(), {"x": b.image(3, 4)}).graph.initializers) == {"w", "w_t"}


@pytest.mark.parametrize("transposed", [False, True])
def test_bias_added_to_a_convolution_is_its_bias(transposed):
    m = b.ModelBuilder()
    m.input("x", ["N", 4, 5, 5])
    op = "ConvTranspose" if transposed else "Conv"
    m.node(
        op, ["x", m.weight("w", 4, 2 if transposed else 4, 3, 3)], "c", "conv", **({"group": 2} if transposed else {})
    )
    m.node("Add", ["c", m.weight("bias", 1, 4, 1, 1)], "y", "add")
    m.output("y")
    model = assert_same(m.build(), {"x": b.image(2, 4, 5, 5)})
    (node,) = model.graph
    assert [v.name for v in node.inputs] == ["x", "w", "bias"] and node.outputs[0].name == "y" and node.name == "conv"
    assert tuple(model.graph.initializers["bias"].shape) == (4,)


@pytest.mark.parametrize("bias_shape", [(5,), (1, 5), (1,), ()])
def test_gemm_scalings_move_into_weight_and_bias(bias_shape):
    m = b.ModelBuilder()
    m.input("x", ["N", 4])
    m.node("Gemm", ["x", m.weight("w", 4, 5), m.weight("b", *bias_shape)], "y", alpha=0.25, beta=3.0)
    m.output("y")
    model = assert_same(m.build(), {"x": b.image(3, 4)})
    (node,) = model.graph
    assert node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
    assert tuple(model.graph.initializers["b"].shape) == (5,)


@pytest.mark.parametrize("proto", [b.control_flow(), b.looped()], ids=["if", "loop"])
def test_control_flow(proto):
    feeds = {"x": b.image(2, 3, 4, 4)}
    if len(proto.graph.input) > 1:
        feeds["flag"] = np.array(True)
    assert_same(proto, feeds)


def test_several_inputs_and_outputs_and_integers():
    m = b.ModelBuilder()
    m.input("ids", ["N", "T"], b.INT64)
    m.input("scale", ["N", 1, 1])
    m.node("Gather", [m.weight("table", 11, 4), "ids"], "e")
    m.node("Mul", ["e", "scale"], "y")
    m.node("ReduceMean", ["y"], "z", axes=[1])
    m.output("y")
    m.output("z")
    proto = m.build()
    ids = np.arange(6).reshape(2, 3)
    assert_same(proto, {"ids": ids, "scale": b.image(2, 1, 1)})
    assert BACKEND.input_specs(BACKEND.adopt(proto)) == {
        "ids": ((None, None), "int64"), "scale": ((None, 1, 1), "float32")
    }  # fmt: skip


def test_functions_are_inlined():
    m = b.ModelBuilder(17, local=1)
    m.input("x", ["N", 3])
    m.node("Twice", ["x"], "y", "call", domain="local")
    m.output("y")
    proto = m.build()
    proto.functions.append(
        helper.make_function("local", "Twice", ["a"], ["c"], [helper.make_node("Add", ["a", "a"], ["c"])],
                             [helper.make_opsetid("", 17)])
    )  # fmt: skip
    model = assert_same(proto, {"x": b.image(2, 3)})
    assert [n.op_type for n in model.graph] == ["Add"]


def test_an_ir_model_is_copied():
    given = ir.from_proto(b.small_cnn(11))
    text = ir.to_proto(given).SerializeToString()
    adopted = BACKEND.adopt(given)
    assert adopted is not given and BACKEND.owns(given) and BACKEND.owns(b.mlp()) and not BACKEND.owns(3)
    assert ir.to_proto(given).SerializeToString() == text


def test_later_changes_of_the_proto_do_not_reach_the_model():
    proto = b.mlp()
    model = BACKEND.adopt(proto)
    before = BACKEND.read(model, ["w1"])["w1"].copy()
    proto.graph.initializer[0].raw_data = bytes(len(proto.graph.initializer[0].raw_data))
    assert np.array_equal(BACKEND.read(model, ["w1"])["w1"], before)


# -- files


@pytest.fixture
def external(tmp_path) -> Path:
    proto = b.small_cnn()
    convert_model_to_external_data(proto, location="weights.bin", size_threshold=0)
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    return path


def test_external_data_are_read_when_needed_and_written_inline(external, tmp_path, monkeypatch):
    monkeypatch.setattr("bitwright_onnx.graph.stored.READ_BYTES", 0)
    x = b.image(2, 3, 8, 8)
    model = BACKEND.load(external)
    tensor = model.graph.initializers["dw.weight"].const_value
    assert isinstance(tensor, StoredTensor)
    held = tensor.numpy()
    assert tensor.numpy() is held and not held.flags.writeable
    del held
    assert tensor._held() is None  # in memory only while somebody has it
    want = b.run(b.small_cnn(), {"x": x})[0]
    np.testing.assert_allclose(outputs(model, {"x": x})[0], want, atol=1e-6)
    path = BACKEND.save(model, tmp_path / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "out.onnx", "weights.bin"]
    np.testing.assert_allclose(b.run(onnx.load(path), {"x": x})[0], want, atol=1e-6)


def test_external_data_on_request_can_be_written_over_themselves(tmp_path):
    path = tmp_path / "m.onnx"
    x = b.image(2, 3, 8, 8)
    first = BACKEND.adopt(b.small_cnn(seed=1))
    BACKEND.save(first, path, external_data=True)
    loaded = BACKEND.load(path)
    second = BACKEND.adopt(b.small_cnn(seed=2))
    BACKEND.save(second, path, external_data=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    # The model that was opened from the replaced files still holds its own weights.
    np.testing.assert_array_equal(outputs(loaded, {"x": x})[0], outputs(first, {"x": x})[0])
    np.testing.assert_array_equal(outputs(BACKEND.load(path), {"x": x})[0], outputs(second, {"x": x})[0])
    BACKEND.save(loaded, path, external_data=True)
    np.testing.assert_array_equal(outputs(BACKEND.load(path), {"x": x})[0], outputs(first, {"x": x})[0])


def test_a_foreign_data_file_is_not_overwritten(tmp_path):
    (tmp_path / "m.onnx.data").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"m\.onnx\.data.*belongs to no model"):
        BACKEND.save(BACKEND.adopt(b.mlp()), tmp_path / "m.onnx", external_data=True)
    assert (tmp_path / "m.onnx.data").read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx.data"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    BACKEND.save(BACKEND.adopt(b.mlp()), path)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        BACKEND.save(BACKEND.adopt(b.mlp(seed=5)), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_saving_where_there_is_no_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        BACKEND.save(BACKEND.adopt(b.mlp()), tmp_path / "no" / "m.onnx")
    with pytest.raises(InputError, match="it is a folder"):
        BACKEND.save(BACKEND.adopt(b.mlp()), tmp_path)


def test_external_data_that_change_while_they_are_used_are_an_error_and_no_signal(external, monkeypatch):
    monkeypatch.setattr("bitwright_onnx.graph.stored.READ_BYTES", 0)
    model, weights = BACKEND.load(external), external.with_name("weights.bin")
    whole = weights.read_bytes()
    os.truncate(weights, 8)
    with pytest.raises(ModelError, match=r"'dw\.weight' can't be read: .*weights\.bin was changed while it was in use"):
        BACKEND.read(model, ["dw.weight"])
    with pytest.raises(ModelError, match="was changed while it was in use"):
        outputs(model, {"x": b.image(2, 3, 8, 8)})
    weights.write_bytes(whole[::-1])  # in place, of the same length
    with pytest.raises(ModelError, match="was changed while it was in use"):
        BACKEND.read(model, ["dw.weight"])


@pytest.mark.parametrize("entries", [{"offset": "-8"}, {"length": "4"}, {"offset": str(2**62)}, {"length": "-1"}])
def test_external_data_of_impossible_places_are_refused(external, entries):
    proto = onnx.load(external, load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.name == "dw.weight")
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)
    onnx.save(proto, external)
    with pytest.raises(ModelError, match=r"m\.onnx"):
        BACKEND.load(external)


@pytest.mark.parametrize("kind", ["FLOAT", "INT4", "BFLOAT16", "FLOAT8E4M3FN"])
def test_external_data_of_every_width(tmp_path, kind):
    dtype = ir.DataType[kind]
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32).astype(dtype.numpy())
    weight = ir.Value(name="w", const_value=ir.Tensor(values, dtype=dtype, name="w"), shape=ir.Shape([3, 5]))
    weight.type = ir.TensorType(dtype)
    node = ir.node("Identity", [weight])
    node.outputs[0].name, node.outputs[0].type = "y", weight.type
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21}, name="g")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    found = stored_tensor(
        ir.load(tmp_path / "m.onnx").graph.initializers["w"].const_value, HeldFile(tmp_path / "m.data")
    )
    np.testing.assert_array_equal(found.numpy().astype(np.float32), values.astype(np.float32))
    assert found.tobytes() == ir.Tensor(values, dtype=dtype).tobytes()


def test_weights_put_into_the_written_message_are_where_protobuf_has_them(monkeypatch):
    monkeypatch.setattr(writing, "STREAMED", 64)
    for proto in (b.small_cnn(), b.mlp()):
        proto.doc_string, proto.graph.doc_string = "of the model", "of the graph"
        proto.metadata_props.add(key="k", value="v")
        model = BACKEND.adopt(proto)
        first = next(v.const_value for v in model.graph.initializers.values() if v.const_value.nbytes >= 64)
        first.doc_string = "of a weight"
        whole = ir.to_proto(model).SerializeToString()
        file = io.BytesIO()
        writing.write_inline(model.clone(), file)
        assert file.getvalue() == whole


@pytest.fixture
def weights_stay_in_files(monkeypatch):
    monkeypatch.setattr("bitwright_onnx.graph.stored.READ_BYTES", 0)
    monkeypatch.setattr(reading, "LAZY_ABOVE", 0)
    monkeypatch.setattr(reading, "STREAMED", 64)


@pytest.mark.usefixtures("weights_stay_in_files")
def test_weights_are_left_in_a_large_file(tmp_path):
    path, x = tmp_path / "m.onnx", {"x": b.image(2, 3, 8, 8)}
    proto = b.small_cnn()
    onnx.save(proto, path)
    model = BACKEND.load(path)
    tensors = [v.const_value for v in model.graph.initializers.values()]
    assert sum(isinstance(t, StoredTensor) for t in tensors) >= 2
    np.testing.assert_array_equal(outputs(model, x)[0], outputs(BACKEND.adopt(proto), x)[0])
    assert BACKEND.source_files(model) == set()  # the model's own file is known by its path
    with path.open("r+b") as file:
        file.write(b"other")
    with pytest.raises(ModelError, match=r"m\.onnx was changed while it was in use"):
        outputs(model, x)
    link = tmp_path / "elsewhere"
    link.mkdir()
    onnx.save(proto, path)
    (link / "m.onnx").symlink_to(path)  # the model's own path may lead anywhere
    assert outputs(BACKEND.load(link / "m.onnx"), x)


@pytest.mark.usefixtures("weights_stay_in_files")
def test_large_files_that_are_cut_off_or_damaged_are_refused_in_words(tmp_path):
    path = tmp_path / "m.onnx"
    whole = b.mlp().SerializeToString()
    rng = np.random.default_rng(0)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises((InputError, ModelError)):
            BACKEND.load(path)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError, ModelError):
            BACKEND.load(path)


def test_a_model_cannot_name_its_own_file_as_data_by_hand(tmp_path):
    proto = b.small_cnn()
    tensor = next(t for t in proto.graph.initializer if t.name == "dw.weight")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", reading.INSIDE), ("offset", "0"), ("length", "288")):
        tensor.external_data.add(key=key, value=value)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="NUL"):
        BACKEND.load(tmp_path / "m.onnx")


def test_missing_and_short_external_data(external):
    weights = external.with_name("weights.bin")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"m\.onnx.*cut short"):
        BACKEND.load(external)
    weights.unlink()
    with pytest.raises(ModelError, match=r"weights\.bin.*Keep the data file beside the model"):
        BACKEND.load(external)


def test_external_data_outside_the_folder_are_refused(tmp_path):
    proto = b.mlp()
    convert_model_to_external_data(proto, location="w.bin", size_threshold=0)
    (tmp_path / "inside").mkdir()
    onnx.save(proto, tmp_path / "inside" / "m.onnx")
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../w.bin"
    (tmp_path / "inside" / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        BACKEND.load(tmp_path / "inside" / "m.onnx")


@pytest.fixture
def cache(tmp_path):
    """A download cache as the Hugging Face hub lays it: a snapshot of links to files named by their content."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1" / "onnx", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    proto = b.mlp()
    convert_model_to_external_data(proto, location="m.onnx_data", size_threshold=0)
    onnx.save(proto, blobs / "aa")
    (blobs / "m.onnx_data").rename(blobs / "bb")
    (snapshot / "m.onnx").symlink_to("../../../blobs/aa")
    (snapshot / "m.onnx_data").symlink_to("../../../blobs/bb")
    return snapshot, blobs


def test_a_cache_of_links_opens(cache, tmp_path):
    snapshot, _ = cache
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    name = BACKEND.load(snapshot / "m.onnx").graph.inputs[0].name
    want = outputs(BACKEND.adopt(b.mlp()), {name: x})[0]
    np.testing.assert_array_equal(outputs(BACKEND.load(snapshot / "m.onnx"), {name: x})[0], want)
    (tmp_path / "moved").symlink_to(snapshot)  # and through a folder that is a link
    np.testing.assert_array_equal(outputs(BACKEND.load(tmp_path / "moved" / "m.onnx"), {name: x})[0], want)


@pytest.mark.parametrize("how", ["elsewhere", "chain", "folder", "copied model", "absolute", "up", "below"])
def test_links_that_lead_elsewhere_are_refused(cache, tmp_path, how):
    snapshot, blobs = cache
    data, secret = snapshot / "m.onnx_data", tmp_path / "secret"
    (blobs / "bb").rename(secret)
    location = "m.onnx_data"
    data.unlink()
    if how == "elsewhere":
        data.symlink_to(secret)
    elif how == "chain":
        (blobs / "bb").symlink_to(secret)
        data.symlink_to("../../../blobs/bb")
    elif how == "folder":
        (snapshot / "f").symlink_to(tmp_path)
        location = "f/secret"
    elif how == "copied model":  # a model that is not a link has no blobs
        secret.rename(blobs / "bb")
        (snapshot / "m.onnx").unlink()
        (snapshot / "m.onnx").write_bytes((blobs / "aa").read_bytes())
        data.symlink_to("../../../blobs/bb")
    elif how == "absolute":
        location = str(secret)
    elif how == "up":
        location = "../../../../secret"
    else:
        (blobs / "x").mkdir()
        secret.rename(blobs / "x" / "bb")
        data.symlink_to("../../../blobs/x/bb")
    proto = onnx.load(snapshot / "m.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    target = blobs / "aa" if how != "copied model" else snapshot / "m.onnx"
    target.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        BACKEND.load(snapshot / "m.onnx")


def test_truncated_files_at_every_length_are_refused(tmp_path):
    data = b.mlp().SerializeToString()
    path = tmp_path / "m.onnx"
    for end in range(0, len(data), 37):
        path.write_bytes(data[:end])
        with pytest.raises((InputError, ModelError), match=r"m\.onnx"):
            BACKEND.load(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"PK\x03\x04 a zip", b"hello world\n" * 9, b"\x80\x04\x95."])
def test_foreign_files(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"m\.onnx"):
        BACKEND.load(path)


def test_missing_files_folders_and_other_objects(tmp_path):
    with pytest.raises(InputError, match="no model file"):
        BACKEND.load(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="is not a file"):
        BACKEND.load(tmp_path)
    with pytest.raises(InputError, match="a dict is not an ONNX model"):
        BACKEND.adopt({})
    with pytest.raises(InputError, match="no custom-op library"):
        BACKEND.adopt(b.mlp(), custom_ops=[tmp_path / "lib.so"])
    with pytest.raises(InputError, match="no option 'oops'"):
        BACKEND.adopt(b.mlp(), oops=1)


def test_initializer_with_too_little_data():
    proto = b.mlp()
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]
    with pytest.raises(ModelError, match="w1"):
        BACKEND.adopt(proto)


def test_a_tensor_produced_twice():
    proto = b.mlp()
    proto.graph.node.append(helper.make_node("Relu", ["x"], ["h2"], name="again"))
    with pytest.raises(ModelError):
        BACKEND.adopt(proto)


def test_bytes_of_a_model_are_adopted():
    model = BACKEND.adopt(b.mlp().SerializeToString())
    x = b.image(2, 3, 6)
    session = OrtSession(model, [Tap("y")])
    np.testing.assert_allclose(session.run({"x": x})[Tap("y")], b.run(b.mlp(), {"x": x})[0], atol=1e-6)


def test_a_bias_that_exporters_spell_by_cast_and_expand_is_a_parameter():
    m = b.ModelBuilder(18)
    m.input("x", ["N", 3, 8, 8])
    m.node("CastLike", [m.const("zero", np.float32(0.25)), "x"], "zero_like")
    m.node("Expand", ["zero_like", m.const("four", np.array([4], np.int64))], "bias")
    m.node("Conv", ["x", m.weight("w", 4, 3, 3, 3), "bias"], "y")
    m.output("y", None)
    backend = OnnxBackend()
    model = backend.adopt(m.build())
    (op,) = backend.graph(model).linear_ops
    bias = op.params[ParamRole.BIAS]
    assert np.array_equal(backend.read(model, [bias])[bias], np.full(4, 0.25, np.float32))


def test_merged_initializers_of_different_kinds_are_parameters_of_their_own(tmp_path):
    """PyTorch's exporter writes one array of zeros for biases and for the shifts of norms."""
    m = b.ModelBuilder()
    m.input("x", ["n", 4])
    zeros, ones = m.const("zeros", np.zeros(4, np.float32)), m.const("ones", np.ones(4, np.float32))
    m.node("LayerNormalization", ["x", ones, zeros], "n1", "norm1")
    m.node("Gemm", ["n1", m.weight("w1", 4, 4), zeros], "h", "fc1")
    m.node("LayerNormalization", ["h", ones, zeros], "n2", "norm2")
    m.node("Gemm", ["n2", m.weight("w2", 4, 4), zeros], "y", "fc2")
    m.output("y")
    data = {"x": np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)}
    for target in ("default", "htp_v73", "onnxruntime-cpu"):
        sim = QuantSim(m.build(), target=target).calibrate(data)
        params = {op.id: op.params for op in sim.graph}
        assert params["norm1"][ParamRole.BETA] == params["norm2"][ParamRole.BETA] == "zeros"
        assert params["fc1"][ParamRole.BIAS] == params["fc2"][ParamRole.BIAS] == "zeros.fc1"
        assert isinstance(sim.plan["zeros"].decision, Float)
        assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) > 30
        bundle = sim.export(tmp_path / target)
        again = QuantSim(bundle.files["model"], target=target)
        assert set(again.graph.params) == set(sim.graph.params)


def test_the_bias_that_an_addition_gives_a_product_keeps_its_name():
    m = b.ModelBuilder()
    m.input("x", ["n", 4])
    m.node("MatMul", ["x", m.weight("w", 4, 4)], "h", "fc")
    m.node("Add", ["h", m.weight("bias", 4)], "y")
    m.output("y")
    assert QuantSim(m.build()).graph.op("fc").params[ParamRole.BIAS] == "bias"


def test_a_matrix_that_is_a_weight_and_an_operand_of_einsum_stays_one(tmp_path):
    m = b.ModelBuilder()
    m.input("x", ["n", 3], onnx.TensorProto.INT64)
    table = m.weight("table", 10, 4)
    m.node("Gather", [table, "x"], "rows", "embedding")
    m.node("Einsum", ["rows", table], "y", "head", equation="btd,vd->btv")
    m.output("y")
    sim = QuantSim(m.build()).calibrate({"x": np.random.default_rng(0).integers(0, 10, (16, 3))})
    assert [dict(op.params) for op in sim.graph] == [{ParamRole.WEIGHT: "table"}, {ParamRole.CONSTANT: "table"}]
    written = onnx.load(sim.export(tmp_path).files["qdq"])
    assert [i.data_type for i in written.graph.initializer if np.prod(i.dims) == 40] == [onnx.TensorProto.INT8]


def test_an_input_without_a_rank_is_named():
    model = b.mlp()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    sim = QuantSim(model)
    with pytest.raises(InputError, match=f"says nothing of the shape of its input '{model.graph.input[0].name}'"):
        sim.calibrate(np.ones((8, 4), np.float32))
