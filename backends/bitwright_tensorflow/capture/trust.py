"""What a file's graph may do: compute, and nothing else.

A graph is a program: its ops can read and write files, run Python functions of the process, talk to other processes.
Opening a file runs no op of it but those that read its own checkpoint; and a model whose inference depends on an op
that reaches outside is refused, so that running it later touches nothing either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bitwright.errors import ModelError
from bitwright_tensorflow.capture.bombs import called
from bitwright_tensorflow.graph.model import GraphDef, NodeDef, node_of

_OUTSIDE = (
    "PyFunc", "EagerPyFunc", "ReadFile", "WriteFile", "MatchingFiles", "Save", "MergeV2Checkpoints", "Restore",
    "LoadAndRemapMatrix", "GenerateVocabRemapping", "InitializeTableFromTextFile", "WholeFileReader", "TextLineReader",
    "TFRecordReader", "FixedLengthRecordReader", "LMDBReader", "TextLineDataset", "TFRecordDataset",
    "FixedLengthRecordDataset", "LMDBDataset", "SqlDataset", "SnapshotDataset", "SaveDataset", "LoadDataset",
    "CacheDataset", "DistributedSave", "RemoteCall", "_Send", "_Recv", "_HostSend", "_HostRecv", "Send", "Recv",
    "TryRpc", "Rpc", "DebugIdentity", "DebugNanCount", "DebugNumericSummary", "SummaryWriter", "CreateSummary",
    "WriteSummary", "WriteGraphSummary", "WriteScalarSummary", "WriteHistogramSummary", "WriteImageSummary",
    "WriteAudioSummary", "WriteRawProtoSummary", "ImportEvent", "FlushSummaryWriter", "CloseSummaryWriter",
    "GcsConfigure", "BigQueryReader", "IteratorFromStringHandle", "DataService", "RegisterDataset",
    "ConfigureDistributedTPU", "ConfigureTPUEmbedding",
)  # fmt: skip
"""Beginnings of the names of ops that reach outside of the graph."""
_RESTORING = frozenset({
    "RestoreV2", "Restore", "RestoreSlice", "Assign", "AssignVariableOp", "AssignVariableXlaConcatND", "Const",
    "Identity", "IdentityN", "NoOp", "Placeholder", "PlaceholderWithDefault", "VarHandleOp", "VariableV2", "Variable",
    "Reshape", "StringJoin", "Pack", "ConcatV2", "Cast", "Squeeze", "ExpandDims", "Slice", "StridedSlice", "Shape",
    "ReadVariableOp", "PartitionedCall", "StatefulPartitionedCall",
})  # fmt: skip
"""Ops that restoring variables from a checkpoint takes."""
_INITIAL = frozenset({
    "Const", "Fill", "Pack", "Identity", "NoOp", "Assign", "AssignVariableOp", "VarHandleOp", "VariableV2", "Variable",
    "Zeros", "ZerosLike", "Ones", "OnesLike", "Shape", "Reshape", "Cast", "Mul", "Sub", "Add", "AddV2", "RandomUniform",
    "RandomStandardNormal", "TruncatedNormal", "StatelessRandomUniformV2", "StatelessRandomNormalV2",
    "StatelessTruncatedNormalV2",
})  # fmt: skip
"""Ops of a variable's initial value."""


def refuse_outside(graph_def: GraphDef, ends: Sequence[str], where: str) -> None:
    """Refuse a graph whose inference reaches outside of it.

    Args:
        graph_def: of a file.
        ends: the tensors that are computed; what they depend on is looked at, control dependencies and functions too.
        where: the file, for the message.

    Raises:
        ModelError: an op reads or writes files, runs Python functions, or talks to other processes.
    """
    for node in closure(graph_def, ends):
        writes = node.op == "PrintV2" and node.attr["output_stream"].s.startswith(b"file:")
        if node.op.startswith(_OUTSIDE) or writes:
            raise ModelError(
                f"{where}: the network depends on {node.name!r} ({node.op}), which reaches outside of the graph "
                "(files, Python functions, other processes), so it isn't opened; cut the network off behind it: name "
                "its inputs and outputs, or export it without"
            )


def only_restores(graph_def: GraphDef, operation: str) -> str:
    """The first op of another kind among those that restoring the variables runs; empty where all is well."""
    return next((n.op for n in closure(graph_def, [operation]) if n.op not in _RESTORING), "")


def only_initializes(graph_def: GraphDef, operation: str) -> bool:
    """Whether an initializer computes numbers and assigns them, and nothing else."""
    return all(n.op in _INITIAL for n in closure(graph_def, [operation]))


def closure(graph_def: GraphDef, ends: Iterable[str]) -> Iterable[NodeDef]:
    """What ends depend on, in whatever way, with the nodes of all functions that this calls."""
    nodes: Mapping[str, NodeDef] = {n.name: n for n in graph_def.node}
    functions = {f.signature.name: f for f in graph_def.library.function}
    stack = [node_of(e.lstrip("^")) for e in ends]
    seen: set[str] = set()
    seen_functions: set[str] = set()
    while stack:
        name = stack.pop()
        if name in seen or name not in nodes:
            continue
        seen.add(name)
        node = nodes[name]
        if node.op not in functions:
            yield node
        stack += [node_of(i.lstrip("^")) for i in node.input]
        waiting = [f for f in called(node) if f in functions and f not in seen_functions]
        while waiting:
            found = waiting.pop()
            if found in seen_functions:
                continue
            seen_functions.add(found)
            for inner in functions[found].node_def:
                if inner.op not in functions:
                    yield inner
                waiting += [f for f in called(inner) if f in functions and f not in seen_functions]
