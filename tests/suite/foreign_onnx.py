"""The models of the onnx package's backend tests: generated for every operator, and those that it holds as files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from foreign import Foreign, NotRun
from onnx import numpy_helper

FILE_KINDS = ("simple", "pytorch-converted", "pytorch-operator")


@cache
def _cases() -> Mapping[str, Any]:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = list(load_model_tests(kind="node"))
    for kind in FILE_KINDS:
        cases += sorted((c for c in load_model_tests(kind=kind) if c.model_dir), key=lambda c: c.name)
    return {f"{c.kind}/{c.name.removeprefix('test_')}": c for c in cases}


AS_PARAMETERS = "+parameters"
"""Ending of the models whose inputs but for the first are constants, as weights are in trained models."""


def names() -> Mapping[str, str]:
    """Every model's name → its group: the operator that a node model tests, the folder of a file."""
    found = {name: _group(name, case) for name, case in _cases().items()}
    several = {n: g for n, g in found.items() if _cases()[n].model and len(_cases()[n].model.graph.input) > 1}
    return found | {n + AS_PARAMETERS: g for n, g in several.items()}


def _group(name: str, case: Any) -> str:
    if case.model is None:
        return name.partition("/")[0]
    nodes = case.model.graph.node
    return nodes[0].op_type if len(nodes) == 1 else f"{nodes[-1].op_type} (expanded)"


def load(name: str) -> Foreign:
    """A model with its feed and what ONNX Runtime makes of it.

    Raises:
        NotRun: ONNX Runtime refuses it, or doesn't give the same values twice.
    """
    case = _cases()[name.removesuffix(AS_PARAMETERS)]
    if case.model is not None:
        model, inputs = case.model, [_array(v) for v in case.data_sets[0][0]]
    else:
        folder = Path(case.model_dir)
        model = onnx.load(folder / "model.onnx")
        inputs = _stored(folder / "test_data_set_0", model)
    fed = {i.name for i in model.graph.initializer}
    graph_inputs = [i.name for i in model.graph.input if i.name not in fed]
    feeds = dict(zip(graph_inputs, inputs, strict=False))
    if name.endswith(AS_PARAMETERS):
        model, feeds = _with_parameters(model, feeds)
    return Foreign(name, _group(name, case), model, feeds, _expected(model, feeds))


def _with_parameters(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> tuple[onnx.ModelProto, Mapping[str, Any]]:
    """The model with its first input left to be fed, and all others as initializers."""
    first, *others = feeds
    if any(not isinstance(feeds[n], np.ndarray) for n in others):
        raise NotRun("an input that isn't a tensor can't be a constant")
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    kept = [i for i in changed.graph.input if i.name not in others]
    del changed.graph.input[:]
    changed.graph.input.extend(kept)
    changed.graph.initializer.extend(numpy_helper.from_array(feeds[n], n) for n in others)
    return changed, {first: feeds[first]}


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _stored(folder: Path, model: onnx.ModelProto) -> list[Any]:
    found = []
    for index, info in enumerate(model.graph.input):
        path = folder / f"input_{index}.pb"
        if not path.exists():
            break
        if info.type.HasField("sequence_type"):
            sequence = onnx.SequenceProto()
            sequence.ParseFromString(path.read_bytes())
            found.append(numpy_helper.to_list(sequence))
        else:
            found.append(numpy_helper.to_array(onnx.load_tensor(path)))
    return found


def _expected(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> Sequence[Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    results = []
    try:
        for _ in range(2):
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            results.append(session.run(None, dict(feeds)))
    except Exception as error:
        raise NotRun(str(error).splitlines()[0][:200]) from None
    for one, other in zip(*results, strict=True):
        if (
            isinstance(one, np.ndarray)
            and one.dtype != object
            and not np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
        ):
            raise NotRun("two runs give different values")
    return results[0]
