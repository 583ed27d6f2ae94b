"""What the messages say to somebody whose graph doesn't open at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

tf = pytest.importorskip("tensorflow")

import tfnets  # noqa: E402

from bitwright import QuantSim  # noqa: E402
from bitwright.errors import InputError  # noqa: E402
from bitwright_tensorflow import SessionModel  # noqa: E402

v1 = tf.compat.v1


@pytest.fixture
def session() -> Any:
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 3), name="x")
        rate = v1.placeholder_with_default(0.0, (), name="dropout_rate")
        with v1.variable_scope("net"):
            w = v1.get_variable("w", initializer=tfnets.image(3, 2), use_resource=True)
            tf.add(tf.matmul(x, w), rate, name="logits")
        session = v1.Session(graph=graph)
        session.run(v1.global_variables_initializer())
    return session


def test_a_name_without_its_scope(session: Any) -> None:
    with pytest.raises(InputError, match=r"no tensor 'logits:0'; did you mean 'net/logits'\?"):
        QuantSim(SessionModel(session, ["logits"]))
    with pytest.raises(InputError, match=r"no tensor 'net/logit:0'; did you mean 'net/logits'\?"):
        QuantSim(SessionModel(session, ["net/logit"]))
    with pytest.raises(InputError, match=r"no placeholder 'dropout'; did you mean 'dropout_rate'\?"):
        QuantSim(SessionModel(session, ["net/logits"], constants={"dropout": 0.0}))


def test_a_checkpoint_by_its_prefix_or_folder(session: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with session.graph.as_default():
        v1.train.Saver().save(session, str(tmp_path / "model.ckpt"))
    for path in (tmp_path / "model.ckpt", tmp_path):
        with pytest.raises(InputError, match=r"did you mean '.*model\.ckpt\.meta'\?"):
            QuantSim(path)
    capfd.readouterr()
    with pytest.raises(InputError, match=r"model\.ckpt\.meta.*--load outputs=logits"):
        QuantSim(tmp_path / "model.ckpt.meta")
    assert capfd.readouterr().err == ""  # TensorFlow has nothing to say of ours
    with pytest.raises(InputError, match="there is no file"):
        QuantSim(tmp_path / "other")
