"""Writing a session's graph with its variables: a .meta file and a checkpoint, as `tf.train.Saver` writes them."""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf

from bitwright.files import cannot_write, written_beside
from bitwright_tensorflow.export.freezing import remove_parts
from bitwright_tensorflow.graph.model import TfModel, open_session
from bitwright_tensorflow.graph.shapes import inference


def save_checkpoint(model: TfModel, path: Path) -> Path:
    """Write `path` (.meta) and, beside it, the checkpoint of the same name; each file whole or not at all.

    The saver in the .meta knows every variable, those that edits have added too. A signature in it says which tensors
    are the network's, so that it opens without being told.

    Raises:
        InputError: a file can't be written.
    """
    session = open_session(model)
    try:
        with session.graph.as_default(), written_beside(path) as folder:
            variables = tf.compat.v1.global_variables()
            saver = tf.compat.v1.train.Saver(variables, save_relative_paths=True)
            saver.save(session, str(folder / path.stem), write_meta_graph=False, write_state=False)
            remove_parts(folder)
            meta = tf.compat.v1.train.export_meta_graph(
                graph=session.graph, saver_def=saver.as_saver_def(), clear_devices=True
            )
            meta.signature_def[model.signature.key].CopyFrom(_signature(model))
            (folder / path.name).write_bytes(meta.SerializeToString(deterministic=True))
    except tf.errors.OpError as error:
        raise cannot_write(path, OSError(0, str(error))) from error
    finally:
        session.close()
    return path


def _signature(model: TfModel) -> tf.compat.v1.MetaGraphDef.SignatureDefEntry:
    from tensorflow.core.protobuf import meta_graph_pb2

    part = inference(model)
    signature = meta_graph_pb2.SignatureDef(method_name="tensorflow/serving/predict")
    for names, infos in ((model.signature.inputs, signature.inputs), (model.signature.outputs, signature.outputs)):
        for name, tensor in names.items():
            dtype, shape = part.spec(tensor)
            infos[name].name, infos[name].dtype = tensor, dtype.as_datatype_enum
            infos[name].tensor_shape.CopyFrom(shape.as_proto())
    return signature
