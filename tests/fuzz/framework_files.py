"""Model files of the frameworks: small ones of each, and the damage done to them."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from mutation import damaged_bytes, damaged_documents, damaged_zip

from bitwright.backend import silenced
from bitwright.plugins import registry


def opened(backend: str, path: Path) -> None:
    """Open a model and look at it, as every command does."""
    found = registry.backend(backend)
    found.graph(found.load(path))


@cache
def keras_files() -> Mapping[str, bytes]:
    """One network as .keras and as .h5."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6, 6, 3), name="x")
    for layer in (layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(name="norm"), layers.ReLU(name="relu"),
                  layers.GlobalAveragePooling2D(name="pool"), layers.Dense(5, name="head")):  # fmt: skip
        x = layer(x)
    model, found = keras.Model(inputs, x), {}
    with tempfile.TemporaryDirectory() as folder, silenced("absl"):
        for suffix in (".keras", ".h5"):
            path = Path(folder) / f"model{suffix}"
            model.save(path)
            opened("keras", path)  # what a first time takes longer isn't the file's
            found[suffix] = path.read_bytes()
    return found


@cache
def pt2_file() -> bytes:
    """A program of PyTorch, with a free dimension."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 5))
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(model.eval(), (torch.zeros(2, 3, 6, 6),), dynamic_shapes=shapes)
    with tempfile.TemporaryDirectory() as folder, silenced("torch"):
        path = Path(folder) / "model.pt2"
        torch.export.save(program, path)
        opened("torch", path)
        return path.read_bytes()


@cache
def saved_model() -> Path:
    """The folder of a network of TensorFlow, for the whole session."""
    import tensorflow as tf

    class Network(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(tf.random.stateless_normal((4, 5), (0, 1)), name="w")
            self.b = tf.Variable(tf.zeros(5), name="b")

        @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
        def __call__(self, x: Any) -> Any:
            return {"y": tf.nn.relu(tf.matmul(x, self.w) + self.b)}

    path = Path(tempfile.mkdtemp()) / "model"
    model = Network()
    tf.saved_model.save(model, str(path), signatures=model.__call__)
    opened("tensorflow", path)
    return path


@cache
def session_files() -> Mapping[str, bytes]:
    """One network of a session, frozen ("net.pb") and as a MetaGraph with its checkpoint ("net.meta", …)."""
    import tensorflow as tf

    v1, found = tf.compat.v1, {}
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        x = v1.placeholder(tf.float32, (None, 6, 6, 3), name="x")
        kernel = v1.get_variable("kernel", initializer=tf.random.stateless_normal((3, 3, 3, 4), (0, 1)))
        y = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "SAME"), tf.ones(4)))
        tf.identity(tf.reduce_mean(y, (1, 2)), name="y")
        session.run(v1.global_variables_initializer())
        frozen = v1.graph_util.convert_variables_to_constants(session, graph.as_graph_def(), ["y"])
        with tempfile.TemporaryDirectory() as folder:
            saver = v1.train.Saver()
            saver.export_meta_graph(f"{folder}/net.meta", clear_devices=True)
            saver.save(session, f"{folder}/net", write_meta_graph=False, write_state=False)
            found = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    meta = v1.MetaGraphDef.FromString(found["net.meta"])
    meta.signature_def["serving_default"].inputs["x"].name = "x:0"
    meta.signature_def["serving_default"].outputs["y"].name = "y:0"
    return {**found, "net.meta": meta.SerializeToString(), "net.pb": frozen.SerializeToString()}


def damaged_frozen() -> st.SearchStrategy[bytes]:
    """Frozen graphs."""
    return damaged_bytes([session_files()["net.pb"]])


def damaged_checkpoint(name: str) -> tuple[Callable[[], st.SearchStrategy[bytes]], Callable[[Path], None]]:
    """A file of a MetaGraph and its checkpoint damaged, and opened beside the others."""

    def read(path: Path) -> None:
        folder = path.parent / "session"
        folder.mkdir(exist_ok=True)
        for other, content in session_files().items():
            (folder / other).write_bytes(path.read_bytes() if other == name else content)
        opened("tensorflow", folder / "net.meta")

    return lambda: damaged_bytes([session_files()[name]]), read


def damaged_keras() -> st.SearchStrategy[bytes]:
    """Archives, and their description of the network."""
    seed = keras_files()[".keras"]
    return st.one_of(damaged_zip([seed]), damaged_member(seed, "config.json"))


def damaged_h5() -> st.SearchStrategy[bytes]:
    """Files, and the description of the network that is an attribute of them."""
    seed = keras_files()[".h5"]
    return st.one_of(damaged_bytes([seed]), damaged_documents([json.loads(_config(seed))]).map(partial(_with, seed)))


def damaged_pt2() -> st.SearchStrategy[bytes]:
    """Archives, and the program in them."""
    seed = pt2_file()
    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        (program,) = (n for n in archive.namelist() if n.endswith("models/model.json"))
    return st.one_of(damaged_zip([seed]), damaged_member(seed, program))


def damaged_saved_model(name: str) -> tuple[Callable[[], st.SearchStrategy[bytes]], Callable[[Path], None]]:
    """One file of the folder damaged, and the folder opened with it in its place."""

    def read(path: Path) -> None:
        folder = path.parent / "model"
        if not folder.exists():
            shutil.copytree(saved_model(), folder)
        whole = (folder / name).read_bytes()
        try:
            (folder / name).write_bytes(path.read_bytes())
            opened("tensorflow", folder)
        finally:
            (folder / name).write_bytes(whole)

    return lambda: damaged_bytes([(saved_model() / name).read_bytes()]), read


def damaged_member(seed: bytes, member: str) -> st.SearchStrategy[bytes]:
    """An archive with a JSON member changed as such."""
    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        document = json.loads(archive.read(member))

    def packed(changed: Any) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(seed)) as source, zipfile.ZipFile(buffer, "w") as made:
            for name in source.namelist():
                made.writestr(name, json.dumps(changed) if name == member else source.read(name))
        return buffer.getvalue()

    return damaged_documents([document]).map(packed)


def _config(seed: bytes) -> str:
    import h5py

    with h5py.File(io.BytesIO(seed), "r") as file:
        return str(file.attrs["model_config"])


def _with(seed: bytes, config: Any) -> bytes:
    import h5py

    buffer = io.BytesIO(seed)
    with h5py.File(buffer, "r+") as file:
        file.attrs["model_config"] = json.dumps(config)
    return buffer.getvalue()
