"""What users evaluate and train: a simulated graph in a session, and as a function for eager code."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, SupportsIndex

import numpy as np
import tensorflow as tf

from bitwright.errors import CapabilityError
from bitwright.graph import TensorId
from bitwright_tensorflow.graph.graph_function import GraphFunction, feed_of, import_meta, named_arguments
from bitwright_tensorflow.graph.model import VARIABLES, Array, MetaGraphDef, Signature
from bitwright_tensorflow.graph.runtime import session_config, set_together
from bitwright_tensorflow.simulate.recomputed import recompute

v1 = tf.compat.v1


class Assigner:
    """Sets variables of a session's graph; the ops are made once for each."""

    def __init__(self, session: tf.compat.v1.Session) -> None:
        self._session = session
        self._handles = {op.name: op for op in session.graph.get_operations() if op.type in VARIABLES}
        self._made: dict[str, tuple[Any, Any]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    @property
    def names(self) -> frozenset[str]:
        """Every variable node."""
        return frozenset(self._handles)

    def assign(self, values: Mapping[str, Any]) -> None:
        """Set some variables by node name, shapes included where these are free."""
        graph = self._session.graph
        with graph.as_default(), graph.control_dependencies(None), graph.name_scope("bitwright/"):
            for name in values:
                if name not in self._made:
                    self._made[name] = self._make(self._handles[name])
        for names in set_together(values, values):
            pairs = {name: self._made[name] for name in names}
            self._session.run([a for a, _ in pairs.values()], {p: np.asarray(values[n]) for n, (_, p) in pairs.items()})

    def _make(self, op: Any) -> tuple[Any, Any]:
        dtype = tf.as_dtype(op.get_attr("dtype")).base_dtype
        given = v1.placeholder(dtype, None, name="value")
        if op.type == "VarHandleOp":
            return tf.raw_ops.AssignVariableOp(resource=op.outputs[0], value=given), given
        return v1.assign(op.outputs[0], given, validate_shape=False).op, given


def read_variables(session: tf.compat.v1.Session, names: Sequence[str]) -> dict[str, Array]:
    """Values of variables by node name."""
    graph, fetches = session.graph, {}
    wanted = set(names)
    with graph.as_default(), graph.control_dependencies(None), graph.name_scope("bitwright/"):
        for op in graph.get_operations():
            if op.name not in wanted or op.type not in VARIABLES:
                continue
            if op.type != "VarHandleOp":
                fetches[op.name] = op.outputs[0]
                continue
            key = f"bitwright/read/{op.name}"
            known = graph.get_collection(key)
            if not known:
                dtype = tf.as_dtype(op.get_attr("dtype"))
                known = [tf.raw_ops.ReadVariableOp(resource=op.outputs[0], dtype=dtype)]
                graph.add_to_collection(key, known[0])
            fetches[op.name] = known[0]
    found: dict[str, Array] = session.run(fetches)
    return found


class SimulatedModel:
    """A TensorFlow graph with fake quantization, in a session of its own.

    Attributes:
        graph: to build losses, metrics and optimizers in.
        session: its variables are set.
        inputs: names of the tensors to feed.
        outputs: names of the tensors that the model computes, after their own fake quantization.
        signature: the user's names of both.
    """

    def __init__(
        self,
        meta: MetaGraphDef,
        values: Mapping[str, Any],
        inputs: Sequence[TensorId],
        outputs: Mapping[TensorId, TensorId],
        signature: Signature,
        grids: Collection[str] = (),
    ) -> None:
        self._grids = frozenset(grids)
        self.inputs, self.outputs, self.signature = tuple(inputs), tuple(outputs.values()), signature
        self._results = {name: outputs[tensor] for name, tensor in signature.outputs.items()}
        self.meta = meta
        self.graph = tf.Graph()
        with self.graph.as_default():
            import_meta(meta)
        recompute(self.graph)
        self.session = v1.Session(graph=self.graph, config=session_config())
        self._assigner = Assigner(self.session)
        self._function: GraphFunction | None = None
        self.assign(values)
        tables = self.graph.get_collection(v1.GraphKeys.TABLE_INITIALIZERS)
        if tables:
            self.session.run(tables)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise CapabilityError(
            "a simulated graph can't be pickled: keep its simulation (sim.save(folder), before trainable()) and what a "
            "tf.compat.v1.train.Saver writes of its session; where they are needed, QuantSim.load(folder).trainable() "
            "has the graph again, and a Saver restores"
        )

    # -- evaluation

    def run(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        """Outputs by the user's name for one batch of inputs, by tensor or argument name.

        Raises:
            InputError: an input is missing or unknown.
        """
        feed = feed_of(batch, self.inputs, self.signature)
        found: dict[str, Array] = self.session.run(self.signature_outputs, feed)
        return found

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run it on arrays, by position or by name; one array, or a dictionary where there are several outputs."""
        results = self.run(named_arguments(arguments, named, self.inputs))
        return next(iter(results.values())) if len(results) == 1 else results

    @property
    def signature_outputs(self) -> dict[str, TensorId]:
        """The user's names of outputs → tensors of this graph."""
        return dict(self._results)

    # -- training in the session

    @property
    def trainable_variables(self) -> list[Any]:
        """The graph's trainable variables: the user's own, and learned scales."""
        return list(self.graph.get_collection(v1.GraphKeys.TRAINABLE_VARIABLES))

    @property
    def grid_variables(self) -> list[Any]:
        """Those of them that are learned scales and zero points, to give them a learning rate of their own."""
        return [v for v in self.trainable_variables if v.op.name in self._grids]

    def initialize(self) -> list[str]:
        """Initialize the variables that have no value yet, such as an optimizer's slots, and no others.

        Returns:
            Their names.
        """
        with self.graph.as_default():
            known = v1.global_variables() + v1.local_variables()
            flags = self.session.run([v1.is_variable_initialized(v) for v in known])
            fresh = [v for v, done in zip(known, flags, strict=True) if not done]
            self.session.run(v1.variables_initializer(fresh))
        return [v.op.name for v in fresh]

    # -- as a function

    @property
    def function(self) -> GraphFunction:
        """The same network for eager code, with `tf.Variable`s of its own, which hold what the session's hold now.

        From the first call on they are what `float_model` and `get` of a trainable simulation read.

        Raises:
            ModelError: the graph has reference variables (TF 1), which functions can't have.
        """
        if self._function is None:
            names = [n for n in self._assigner.names if not n.startswith("bitwright/")]
            values = read_variables(self.session, names)
            self._function = GraphFunction(self.meta, values, self.inputs, self.signature_outputs, self.signature)
            recompute(self._function.concrete.graph)
        return self._function

    # -- for the simulation

    def assign(self, values: Mapping[str, Array]) -> None:
        """Set variables by node name, in the session and in the function; names that the graph lacks are passed."""
        self._assigner.assign({n: v for n, v in values.items() if n in self._assigner})
        if self._function is not None:
            self._function.assign(values)

    def read(self, names: Sequence[str]) -> dict[str, Array]:
        """Present values of variables, by node name."""
        if self._function is not None:
            return self._function.read(names)
        return read_variables(self.session, names)

    def fetch(self, tensors: Sequence[TensorId]) -> list[Array]:
        """Tensors that depend on variables alone."""
        if self._function is not None:
            return self._function.fetch(tensors)
        found: list[Array] = self.session.run(list(tensors))
        return found
